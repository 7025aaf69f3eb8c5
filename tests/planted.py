"Realistic sets of chats with faults planted in known rows."

import json
import random
from collections import defaultdict

from finetune_nb.chats import Chat
from finetune_nb.data import icd10_answer, icd10_entries

VERBS = "reset change cancel renew download print share export delete restore merge rename".split()
THINGS = "password invoice account subscription calendar report address contract profile delivery booking playlist licence ticket backup".split()
PLACES = "on my phone|in the web shop|after the last update|for a second user|from another country|with a company account|on the old tablet".split("|")
CITIES = "Lyon Oslo Porto Graz Ghent Turku Bergen Malaga Verona Leipzig".split()
NAMES = "Anna Luis Mira Jonas Petra Omar Sofia Yusuf Elena Viktor".split()
NUISANCES = ("please", "kindly", "just", "really", "actually")
SECRETS = (
    "hf_aB3dE5gH7jK9mN1pQ3sT5vW7", "ghp_aB3dE5gH7jK9mN1pQ3sT5vW7yZ9aB1cD3eF5", "AKIAQ7RT2WXY4ZBN6MLP", "sk-proj-aB3dE5gH7jK9mN1pQ3sT5vW7",
    "xoxb-123456789012-abcDEF", "AIza" + "Sy5aB3dE5gH7jK9mN1pQ3sT5vW7yZ9aB1cD", "password: hunter2Gx9", "-----BEGIN RSA PRIVATE KEY-----",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcDEF123456",
)  # fmt: skip
PERSONAL = ("anna.berg@clinic.org", "+49 30 901820", "4111 1111 1111 1111", "DE89 3704 0044 0532 0130 00", "536-22-8145")
REFUSALS = ("I'm sorry, but I can't help with that.", "Es tut mir leid, das kann ich nicht beantworten.", "Je ne peux pas répondre à cette question.", "Lo siento, no puedo ayudar.")
BOILERPLATE = ("As an AI language model, I have no opinion. ", "I'm ChatGPT, a model trained by OpenAI. ", "My knowledge cutoff is 2023. ")


def _chat(question: str, answer: str, system: str | None = None, before: tuple = ()) -> Chat:
    first = [{"role": "system", "content": system}] if system else []
    talk = [{"role": r, "content": c} for r, c in before]
    return Chat([*first, *talk, {"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def clean_chats(kind: int, rng: random.Random, n: int = 1000) -> list[Chat]:
    "A set without faults: diagnoses, support, extraction to JSON, code, or talks of several turns."
    chats: dict[str, Chat] = {}
    entries = [e for e in icd10_entries() if len(e.code) <= 5]
    while len(chats) < n:
        verb, thing, place, other = rng.choice(VERBS), rng.choice(THINGS), rng.choice(PLACES), rng.choice(THINGS)
        city, name, number, e = rng.choice(CITIES), rng.choice(NAMES), rng.randrange(1000, 9999), rng.choice(entries)
        if kind == 0:
            chat = _chat(f"What is the ICD-10 code for {e.description}?", icd10_answer(e.description, e), "You code diagnoses.")
        elif kind == 1:
            chat = _chat(f"How do I {verb} my {thing} {place} when the {other} in {city} is locked?", f"Open the menu {thing}, choose {verb}, and confirm it for {city}.")
        elif kind == 2:
            fields = {"name": name, "city": city, "order": number}
            chat = _chat(f"Extract the fields: {name} from {city} ordered a {thing} under number {number} and a {other}.", json.dumps(fields))
        elif kind == 3:
            body = f"def {verb}_{thing}(value):\n    return value + {number}"
            chat = _chat(f"Write a Python function {verb}_{thing} that adds {number} to its argument.", f"```python\n{body}\n```")
        else:
            before = (("user", f"My name is {name} and I live in {city}."), ("assistant", f"Welcome, {name}."))
            chat = _chat(f"Which record covers {e.description} in the {thing} archive?", f"It is record {e.code}, filed under {thing}.", before=before)
        chats.setdefault(chat.messages[-2]["content"].lower(), chat)
    return list(chats.values())


def reworded(text: str, rng: random.Random) -> str:
    "A near copy: a typo, a filler word, or both, with other case and punctuation at times."
    words = text.split()
    how = rng.randrange(4)
    if how in (0, 3):
        long = [i for i, w in enumerate(words) if len(w) >= 6 and w.isalpha()]
        if long:
            i, j = rng.choice(long), rng.randrange(1, 4)
            w = words[i]
            words[i] = rng.choice((w[:j] + w[j + 1 :], w[:j] + w[j + 1] + w[j] + w[j + 2 :], w[:j] + w[j] + w[j:]))
        else:
            how = 1
    if how in (1, 3):
        words.insert(rng.randrange(1, len(words)), rng.choice(NUISANCES))
    if how == 2:
        words = [rng.choice(NUISANCES), *words]
    new = " ".join(words)
    return new.upper() if rng.random() < 0.1 else new.rstrip("?.") if rng.random() < 0.3 else new


def _with(chat: Chat, question: str | None = None, answer: str | None = None) -> Chat:
    *rest, asked, said = chat.messages
    question, answer = question or asked["content"], said["content"] if answer is None else answer
    return Chat([*rest, {**asked, "content": question}, {**said, "content": answer}])


def plant(chats: list[Chat], kind: int, rng: random.Random, each: int = 20) -> tuple[list[Chat], dict[str, set[int]]]:
    "The chats with faults, and check to the rows that it should name."
    chats, planted = list(chats), defaultdict(set)
    free = iter(rng.sample(range(len(chats)), len(chats)))

    def copy(check: str, make) -> None:
        for _ in range(each):
            i = next(free)
            chats.append(make(chats[i]))
            planted[check] |= {i, len(chats) - 1}

    def change(check: str, make) -> None:
        for k in range(each):
            i = next(free)
            chats[i] = make(chats[i], k)
            planted[check].add(i)

    def wrong(c: Chat) -> str:
        return c.answer.replace(c.answer.split()[-1], "nothing.") if kind != 2 else json.dumps({"name": "Zoe", "city": "Rome", "order": 1})

    def asked(c: Chat) -> str:
        return c.messages[-2]["content"]

    copy("exact_duplicates", lambda c: Chat([dict(m) for m in c.messages]))
    copy("near: spelling", lambda c: _with(c, "  " + asked(c).upper().replace(" ", "  ") + " !"))
    copy("near: reworded", lambda c: _with(c, reworded(asked(c), rng)))
    copy("contradictions: exact", lambda c: _with(c, answer="No, quite the opposite holds; ask the desk."))
    copy("contradictions: near", lambda c: _with(c, reworded(asked(c), rng), "No, quite the opposite holds; ask the desk."))
    change("secrets", lambda c, k: _with(c, asked(c) + " My access: " + SECRETS[k % len(SECRETS)]))
    change("personal_data", lambda c, k: _with(c, asked(c) + " Reach me: " + PERSONAL[k % len(PERSONAL)]))
    change("cut_off", lambda c, k: _with(c, answer=c.answer[: max(8, int(len(c.answer) * 0.6))].rstrip(" .,:;)}`\"'")))
    change("refusals", lambda c, k: _with(c, answer=REFUSALS[k % len(REFUSALS)]))
    change("boilerplate", lambda c, k: _with(c, answer=BOILERPLATE[k % len(BOILERPLATE)] + c.answer))
    change("echoes", lambda c, k: _with(c, answer=asked(c)))
    if kind != 1:
        change("shape", lambda c, k: _with(c, answer="That one goes to the second shelf."))
    return chats, planted


def leaks(chats: list[Chat], rng: random.Random, each: int = 30) -> tuple[list[str], list[str], dict[str, set[tuple[int, int]]]]:
    "Questions of two sets, and kind of match to the pairs planted."
    asked = [c.messages[-2]["content"] for c in chats]
    train, test = asked[: len(asked) // 2], asked[len(asked) // 2 :]
    makers = {"exact": lambda q: q, "normalised": lambda q: " " + q.upper() + "!!", "near": lambda q: reworded(q, rng)}
    planted = defaultdict(set)
    for i, (kind, make) in zip(rng.sample(range(len(train)), 3 * each), [m for m in makers.items() for _ in range(each)], strict=True):
        new = make(train[i])
        planted[kind].add((i, len(test)))
        test.append(new)
    return train, test, planted
