"""A tiny model with a tokenizer cut short, so that whole runs take a second."""

import gc
import json
import os
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import browser
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # `make test` keeps every core busy with tests of its own
    os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 4096  # tokens of the tiny models
SHARING = {f"test_{name}.py" for name in ("checkpoints", "compare", "damage", "diagnosis", "evaluation", "gradient_parity", "jobs", "live_plan", "many", "panel", "preflight", "project", "report", "secrets", "several", "site", "sweep", "thirty_modes")}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "The tests in a browser share one worker, and with it a server and a browser; so do the tests of a file that share what is long in the making. All others go to whoever is free (marks of groups are lost with pytest 9.2)."
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0].rpartition("/")[2]
            return "browser" if file.endswith("browser.py") else file if file in SHARING else nodeid

    return Together(config, log)


@pytest.fixture(scope="module", autouse=True)
def little_to_collect(request):
    "A run collects garbage a few times: what stands there when a file begins that is long at work is not gone through each time."
    if request.path.name in SHARING:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    "A folder with a Llama of two layers, random weights, and the small tokenizer."
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def biased_model(tmp_path_factory):
    "The same with biases in its attention."
    return save_tiny(tmp_path_factory.mktemp("biased"), attention_bias=True)


WORDS = "system\nuser\nassistant\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face\nWhat is two plus one?\nIt is 4. Really.\nYes.\nNo, no.\nSure?\nThe zebra\nThat makes 5, no doubt.\nAnd after 6?\nHow many"


@cache
def small_tokenizer():
    "That of the embedded model with its first merges and those of some words: the same control tokens and template, and a run with the tiny model takes half of the time."
    from finetune_nb.models import load_tokenizer

    with TemporaryDirectory() as folder:
        whole = load_tokenizer()
        whole.save_pretrained(folder)
        file = Path(folder) / "tokenizer.json"
        told = json.loads(file.read_text(encoding="utf-8"))
        vocabulary, merges = told["model"]["vocab"], [pair if isinstance(pair, list) else pair.split(" ") for pair in told["model"]["merges"]]
        made_of, needed, open_ = {"".join(pair): pair for pair in merges}, set(), whole.tokenize(WORDS)
        while open_:
            piece = open_.pop()
            needed.add(piece)
            open_ += made_of.get(piece, [])
        others = [piece for piece in sorted(vocabulary, key=vocabulary.get) if piece not in needed]
        kept = {piece: i for i, piece in enumerate(sorted({*others[: VOCABULARY - len(needed)], *needed}, key=vocabulary.get))}
        told["model"] |= {"vocab": kept, "merges": [pair for pair in merges if {*pair, "".join(pair)} <= kept.keys()]}
        file.write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")
        (Path(folder) / "config.json").write_text('{"model_type": "llama"}')
        return load_tokenizer(folder)


def save_tiny(folder, **more):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = small_tokenizer()
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}  # fmt: skip
    config = LlamaConfig(vocab_size=len(tokenizer), **shape | more)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    gc.collect()
    gc.freeze()  # a run collects garbage a few times, and all that is imported by now would be gone through each time
    return str(folder)


@pytest.fixture
def chats():
    "Forty short chats."
    return some_chats()


def some_chats():
    from finetune_nb.data import Chat

    def chat(i):
        texts = (("user", f"What is {i} plus one?"), ("assistant", f"It is {i + 1}." + " Really." * (i % 5)))
        return Chat([{"role": role, "content": text} for role, text in texts], f"chats.jsonl, line {i + 1}")

    return [chat(i) for i in range(40)]


def some_splits():
    "Twenty-four of them to train on, eight to look at, eight for the test."
    from finetune_nb.data import Splits

    chats = some_chats()
    return Splits(chats[:24], chats[24:32], chats[32:])


@pytest.fixture
def quick(tiny_model, tmp_path):
    "A configuration that trains the tiny model in fp32 in a second."
    return quick_config(tiny_model, tmp_path)


def quick_config(tiny_model, folder):
    from finetune_nb.config import FinetuneConfig

    return FinetuneConfig(
        model_name_or_path=tiny_model,
        bf16=False,
        use_cpu=True,
        num_train_epochs=2,
        learning_rate=5e-3,
        gradient_accumulation_steps=1,
        logging_steps=1,
        output_dir=str(folder / "runs"),
        max_new_tokens=8,
    )


@pytest.fixture
def tokenizer(tiny_model):
    from finetune_nb.models import load_tokenizer

    return load_tokenizer(tiny_model)


@pytest.fixture
def rows(chats, tokenizer):
    "The forty chats as token ids and labels."
    from finetune_nb.chat_template import tokenize_chats

    return list(tokenize_chats(chats, tokenizer))


@pytest.fixture(scope="module")
def one_way():
    "Attention is computed in the way that was measured as the fastest, and ways differ in the last bit; here it's always the same one."
    from finetune_nb import training

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "fastest_ways", lambda *args: ["tree"])
        yield


@pytest.fixture(scope="module")
def chromium():
    "Headless Chromium; for one module at a time, since Playwright keeps an event loop running that other tests would meet."
    if reason := browser.why_not():
        pytest.skip(reason)
    with browser.running_chromium() as started:
        yield started


def server(kind, package, place):
    "A fixture: a server of this kind over a temporary folder; skips with the reason why there is none."

    @pytest.fixture(scope="module", name=f"{kind}_server")
    def running(tmp_path_factory):
        if reason := browser.why_not(package):
            pytest.skip(reason)
        with browser.running_server(kind, tmp_path_factory.mktemp(kind)) as started:
            yield started

    running.__doc__ = f"{place} over a temporary folder."
    return running


def page(kind, name, made):
    "A fixture: a fresh page of such a server, for what the class `made` can do with it."

    @pytest.fixture(name=name)
    def fresh(chromium, request):
        shown = made(chromium, request.getfixturevalue(f"{kind}_server"))
        yield shown
        shown.close()

    fresh.__doc__ = f"A fresh page: see `browser.{made.__name__}` for what can be done with it."
    return fresh


lab_server, lab = server("lab", "jupyterlab", "JupyterLab"), page("lab", "lab", browser.Lab)
notebook_server, notebook7 = server("notebook", "notebook", "Jupyter Notebook"), page("notebook", "notebook7", browser.Notebook7)
voila_server, voila = server("voila", "voila", "Voila"), page("voila", "voila", browser.Voila)
