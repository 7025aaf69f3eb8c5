"""Chat templates of real families, written anew after the published behaviour, and what they must teach, written by hand.

Each case gives the rows of training: the whole text, and the pieces of it that carry loss. Where a family rewrites earlier
turns, a chat becomes several rows. `refused` names a word of the error where no honest mask exists.
"""

from dataclasses import dataclass, field
from typing import Any

Q1, A1 = "What is 2 + 2?", "a"
Q2, A2 = "assistant or user?\nÄ 漢 {{ x }}", "Say \\frac{1}{2}:\n\n```py\nx = 1\n```\nSchön 🙂 e\u0301"
SYS = "Be brief."


@dataclass(frozen=True)
class Row:
    text: str  # the whole text of the row
    taught: tuple[str, ...]  # the pieces that carry loss, in order


@dataclass(frozen=True)
class Case:
    name: str
    messages: list[dict[str, Any]]
    rows: tuple[Row, ...] = ()
    tools: list[dict[str, Any]] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None


@dataclass(frozen=True)
class Family:
    name: str
    template: str
    special: tuple[str, ...]  # special tokens
    eos: str
    cases: tuple[Case, ...]
    bos: str | None = None
    plain: tuple[str, ...] = ()  # tokens of the vocabulary that are not special
    split: str | None = None  # how the family's tokenizer cuts words, where that matters; else as GPT-2


def chat(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    start = [{"role": "system", "content": system}] if system is not None else []
    return start + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def case(name: str, messages: list[dict[str, Any]], text: str, *taught: str, **more: Any) -> Case:
    return Case(name, messages, (Row(text, taught),), **more)


TWO, TOLD = chat(Q1, A1, Q2, A2), chat(Q1, A1, Q2, A2, system=SYS)
TOOL = {"type": "function", "function": {"name": "get_time", "description": "The time.", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}}}
TOOL_JSON = '{"type": "function", "function": {"name": "get_time", "description": "The time.", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}}}'


def calling(arguments: Any) -> list[dict[str, Any]]:
    asked = [{"id": "abc123def", "type": "function", "function": {"name": "get_time", "arguments": arguments}}]
    return [
        {"role": "user", "content": "Time in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": asked},
        {"role": "tool", "name": "get_time", "tool_call_id": "abc123def", "content": "12:30"},
        {"role": "assistant", "content": "Half past twelve."},
    ]


CALL = '{"zone": "Europe/Rome"}'
THOUGHT = [
    {"role": "user", "content": Q1},
    {"role": "assistant", "content": "4", "reasoning_content": "Two and two."},
    {"role": "user", "content": Q2},
    {"role": "assistant", "content": A2, "reasoning_content": "Half."},
]

# ------------------------------------------------------------------------------------------------ ChatML and its children
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IM = ("<|im_start|>", "<|im_end|>")


def im(*turns: str) -> str:
    return "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns)


PLAIN_TEXT = im(f"user\n{Q1}", f"assistant\n{A1}", f"user\n{Q2}", f"assistant\n{A2}")
TAUGHT = (f"{A1}<|im_end|>", f"{A2}<|im_end|>")
chatml_cases = (
    case("two turns", TWO, PLAIN_TEXT, *TAUGHT),
    case("system", TOLD, im(f"system\n{SYS}") + PLAIN_TEXT, *TAUGHT),
    case("padded", chat("  q \n", "  a \n"), im("user\n  q \n", "assistant\n  a \n"), "  a \n<|im_end|>"),
    case("echo", chat("Say: x", "Say: x"), im("user\nSay: x", "assistant\nSay: x"), "Say: x<|im_end|>"),
)
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
QWEN25 = (
    "{% set told = messages[0].content if messages[0].role == 'system' else 'You are Qwen.' %}<|im_start|>system\n{{ told }}"
    "{% if tools %}{{ '\n\n# Tools\n\n<tools>' }}{% for t in tools %}{{ '\n' }}{{ t | tojson }}{% endfor %}{{ '\n</tools>' }}{% endif %}<|im_end|>\n"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% elif m.role == 'assistant' and m.tool_calls %}<|im_start|>assistant{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    '{% for c in m.tool_calls %}{{ "\n" }}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n'
    "{% elif m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_TOOLS = im(f"system\nYou are Qwen.\n\n# Tools\n\n<tools>\n{TOOL_JSON}\n</tools>", "user\nTime in Rome?")
QWEN_CALL = f'<tool_call>\n{{"name": "get_time", "arguments": {CALL}}}\n</tool_call><|im_end|>'
QWEN_TOLD = "<|im_start|>assistant\n" + QWEN_CALL + "\n" + im("user\n<tool_response>\n12:30\n</tool_response>")
TOOL_TAGS = ("<tool_call>", "</tool_call>")

# Qwen 3 drops the reasoning of turns before the last question, and writes an empty block into the last turn when there is none.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}# Tools\n\n<tools>"
    "{% for t in tools %}{{ '\n' }}{{ t | tojson }}{% endfor %}{{ '\n</tools>' }}<|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or m.reasoning_content) %}<think>\n{{ (m.reasoning_content or '') | trim }}\n</think>\n\n{% endif %}{{ m.content or '' }}"
    '{% for c in m.tool_calls or [] %}{{ "\n" if m.content or not loop.first }}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n'
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
EMPTY = "<think>\n\n</think>\n\n"
FIRST = im(f"user\n{Q1}")
REST = f"<|im_start|>user\n{Q2}<|im_end|>\n<|im_start|>assistant\n"
qwen3_cases = (
    Case("plain, thinking on", TWO, (
        Row(FIRST + im(f"assistant\n{EMPTY}{A1}"), (f"{EMPTY}{A1}<|im_end|>",)),
        Row(FIRST + im(f"assistant\n{A1}") + REST + f"{EMPTY}{A2}<|im_end|>\n", (f"{EMPTY}{A2}<|im_end|>",)),
    )),
    Case("plain, thinking off", TWO, (
        Row(FIRST + im(f"assistant\n{EMPTY}{A1}"), (f"{A1}<|im_end|>",)),
        Row(FIRST + im(f"assistant\n{A1}") + REST + f"{EMPTY}{A2}<|im_end|>\n", (f"{A2}<|im_end|>",)),
    ), kwargs={"enable_thinking": False}),
    Case("reasoning", THOUGHT, (
        Row(FIRST + im("assistant\n<think>\nTwo and two.\n</think>\n\n4"), ("<think>\nTwo and two.\n</think>\n\n4<|im_end|>",)),
        Row(FIRST + im("assistant\n4") + REST + f"<think>\nHalf.\n</think>\n\n{A2}<|im_end|>\n", (f"<think>\nHalf.\n</think>\n\n{A2}<|im_end|>",)),
    )),
    Case("system, one turn", chat(Q1, A1, system=SYS), (Row(im(f"system\n{SYS}") + FIRST + im(f"assistant\n{EMPTY}{A1}"), (f"{EMPTY}{A1}<|im_end|>",)),)),
    Case("a call and its answer", calling(CALL), (
        Row(im(f"system\n# Tools\n\n<tools>\n{TOOL_JSON}\n</tools>", "user\nTime in Rome?") + f"<|im_start|>assistant\n{EMPTY}{QWEN_CALL}\n", (EMPTY + QWEN_CALL,)),
        Row(im(f"system\n# Tools\n\n<tools>\n{TOOL_JSON}\n</tools>", "user\nTime in Rome?") + QWEN_TOLD + im(f"assistant\n{EMPTY}Half past twelve."), (f"{EMPTY}Half past twelve.<|im_end|>",)),
    ), tools=[TOOL]),
)  # fmt: skip
# Later thinking-only models open the block themselves.
QWEN3_THINKING = QWEN3.partition("{% if enable_thinking")[0].removesuffix("{% if add_generation_prompt %}<|im_start|>assistant\n") + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
SMOLLM3 = (
    "{% set mode = '/no_think' if enable_thinking is defined and not enable_thinking else '/think' %}<|im_start|>system\n## Metadata\n\nReasoning Mode: {{ mode }}"
    "{% if messages[0].role == 'system' %}{{ '\n\n## Custom Instructions\n\n' + messages[0].content }}{% endif %}{{ '\n' }}<|im_end|>\n"
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and mode == '/no_think' %}<think>\n\n</think>\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if mode == '/no_think' %}<think>\n\n</think>\n{% endif %}{% endif %}"
)

FAMILIES: list[Family] = [
    Family("chatml", CHATML, IM, "<|im_end|>", chatml_cases),
    Family("yi", CHATML, ("<|startoftext|>", "<|endoftext|>", *IM), "<|im_end|>", chatml_cases, bos="<|startoftext|>"),
    Family("internlm2", "{{ bos_token }}" + CHATML, ("<s>", "</s>", *IM), "</s>", (case("two turns", TWO, "<s>" + PLAIN_TEXT, *TAUGHT),), bos="<s>"),
    Family("qwen2", DEFAULT_SYSTEM + CHATML, IM, "<|im_end|>", (
        case("two turns", TWO, im("system\nYou are a helpful assistant.") + PLAIN_TEXT, *TAUGHT),
        case("system", TOLD, im(f"system\n{SYS}") + PLAIN_TEXT, *TAUGHT),
    )),
    Family("qwen2.5", QWEN25, IM, "<|im_end|>", (
        case("two turns", TWO, im("system\nYou are Qwen.") + PLAIN_TEXT, *TAUGHT),
        case("system", TOLD, im(f"system\n{SYS}") + PLAIN_TEXT, *TAUGHT),
        case("arguments as text", calling(CALL), QWEN_TOOLS + QWEN_TOLD + im("assistant\nHalf past twelve."), QWEN_CALL, "Half past twelve.<|im_end|>", tools=[TOOL]),
        case("arguments as object", calling({"zone": "Europe/Rome"}), QWEN_TOOLS + QWEN_TOLD + im("assistant\nHalf past twelve."), QWEN_CALL, "Half past twelve.<|im_end|>", tools=[TOOL]),
    ), plain=TOOL_TAGS),
    Family("qwen3", QWEN3, IM, "<|im_end|>", qwen3_cases, plain=(*TOOL_TAGS, "<think>", "</think>")),
    Family("qwen3-thinking", QWEN3_THINKING, IM, "<|im_end|>", (
        Case("reasoning", THOUGHT[:2], (Row(FIRST + im("assistant\n<think>\nTwo and two.\n</think>\n\n4"), ("Two and two.\n</think>\n\n4<|im_end|>",)),)),
        Case("no reasoning", TWO[:2], (Row(FIRST + im(f"assistant\n{EMPTY}{A1}"), (f"\n</think>\n\n{A1}<|im_end|>",)),)),
    ), plain=("<think>", "</think>")),
    Family("smollm3", SMOLLM3, IM, "<|im_end|>", (
        case("thinking", TOLD, im(f"system\n## Metadata\n\nReasoning Mode: /think\n\n## Custom Instructions\n\n{SYS}\n") + PLAIN_TEXT, *TAUGHT),
        case("no thinking", TWO[:2], im("system\n## Metadata\n\nReasoning Mode: /no_think\n") + FIRST + im(f"assistant\n<think>\n\n</think>\n{A1}"), TAUGHT[0], kwargs={"enable_thinking": False}),
    ), plain=("<think>", "</think>")),
    Family("phi-4", (
        "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
    ), (*IM, "<|im_sep|>"), "<|im_end|>", (
        case("two turns", TWO, f"<|im_start|>user<|im_sep|>{Q1}<|im_end|><|im_start|>assistant<|im_sep|>{A1}<|im_end|><|im_start|>user<|im_sep|>{Q2}<|im_end|><|im_start|>assistant<|im_sep|>{A2}<|im_end|>", *TAUGHT),
        case("system", chat(Q1, A1, system=SYS), f"<|im_start|>system<|im_sep|>{SYS}<|im_end|><|im_start|>user<|im_sep|>{Q1}<|im_end|><|im_start|>assistant<|im_sep|>{A1}<|im_end|>", TAUGHT[0]),
    )),
    Family("chatml with marks", (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ), IM, "<|im_end|>", chatml_cases),
    Family("marks without the end", (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n"
        "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ), IM, "<|im_end|>", chatml_cases[:2]),
]  # fmt: skip

# ------------------------------------------------------------------------------------------------ Llama
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set told = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set told = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (told if loop.first else '') + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA31 = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string if date_string is defined else strftime_now('%d %b %Y') }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}<|eot_id|>"
    "{% for m in turns %}{% if m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>"
    "{% elif m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}<|eot_id|>'
    "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{% if tools and loop.first %}Functions:\n{% for t in tools %}{{ t | tojson }}\n\n{% endfor %}{% endif %}"
    "{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
L3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def llama(role: str, text: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"


DATE = {"date_string": "26 Jul 2026"}
FAMILIES += [
    Family("llama-2", LLAMA2, ("<s>", "</s>"), "</s>", (
        case("two turns", TWO, f"<s>[INST] {Q1} [/INST] {A1} </s><s>[INST] {Q2} [/INST] {A2} </s>", f" {A1} </s>", f" {A2} </s>"),
        case("system", TOLD, f"<s>[INST] <<SYS>>\n{SYS}\n<</SYS>>\n\n{Q1} [/INST] {A1} </s><s>[INST] {Q2} [/INST] {A2} </s>", f" {A1} </s>", f" {A2} </s>"),
        case("padded", chat(" q ", "  a \n"), "<s>[INST] q [/INST] a </s>", " a </s>"),
        Case("two in a row", [*TWO[:1], *TWO[:2]], refused="roles must alternate"),
    ), bos="<s>"),
    Family("llama-3", LLAMA3, L3, "<|eot_id|>", (
        case("two turns", TWO, "<|begin_of_text|>" + llama("user", Q1) + llama("assistant", A1) + llama("user", Q2) + llama("assistant", A2), f"{A1}<|eot_id|>", f"{A2}<|eot_id|>"),
        case("system", chat(Q1, A1, system=SYS), "<|begin_of_text|>" + llama("system", SYS) + llama("user", Q1) + llama("assistant", A1), f"{A1}<|eot_id|>"),
        case("padded", chat(" q ", "\n  a \n"), "<|begin_of_text|>" + llama("user", "q") + llama("assistant", "a"), "a<|eot_id|>"),
    ), bos="<|begin_of_text|>", split=LLAMA3_SPLIT),
    Family("llama-3.1", LLAMA31, L3, "<|eot_id|>", (
        case("system", TOLD, "<|begin_of_text|>" + llama("system", f"Today Date: 26 Jul 2026\n\n{SYS}") + llama("user", Q1) + llama("assistant", A1) + llama("user", Q2) + llama("assistant", A2), f"{A1}<|eot_id|>", f"{A2}<|eot_id|>", kwargs=DATE),
        case("call", calling(CALL), "<|begin_of_text|>" + llama("system", "Today Date: 26 Jul 2026\n\n") + llama("user", f"Functions:\n{TOOL_JSON}\n\nTime in Rome?") + llama("assistant", f'{{"name": "get_time", "parameters": {CALL}}}') + llama("ipython", '"12:30"') + llama("assistant", "Half past twelve."), f'{{"name": "get_time", "parameters": {CALL}}}<|eot_id|>', "Half past twelve.<|eot_id|>", tools=[TOOL], kwargs=DATE),
    ), bos="<|begin_of_text|>", split=LLAMA3_SPLIT),
    Family("nemotron", (
        "<extra_id_0>System\n{{ messages[0].content if messages[0].role == 'system' }}\n\n{% for m in messages if m.role != 'system' %}"
        "<extra_id_1>{{ 'User' if m.role == 'user' else 'Assistant' }}\n{{ m.content | trim }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}{% if add_generation_prompt %}<extra_id_1>Assistant\n{% endif %}"
    ), ("<extra_id_0>", "<extra_id_1>", "</s>"), "</s>", (
        case("system", TOLD, f"<extra_id_0>System\n{SYS}\n\n<extra_id_1>User\n{Q1}\n<extra_id_1>Assistant\n{A1}</s>\n<extra_id_1>User\n{Q2}\n<extra_id_1>Assistant\n{A2}</s>\n", f"{A1}</s>", f"{A2}</s>"),
    )),
]  # fmt: skip

# ------------------------------------------------------------------------------------------------ Mistral
MISTRAL1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# The system prompt and the tools stand in front of the last question: they move as a chat goes on.
MISTRAL3 = (
    "{% set told = messages[0].content if messages[0].role == 'system' else '' %}{% set turns = messages[1:] if told else messages %}"
    "{% set ns = namespace(last=-1) %}{% for m in turns %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ bos_token }}"
    "{% for m in turns %}{% if m.role == 'user' %}{% if loop.index0 == ns.last %}{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {% if told %}{{ told }}\n\n{% endif %}{{ m.content }}[/INST]{% else %}[INST] {{ m.content }}[/INST]{% endif %}"
    '{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}{{ ", " if not loop.last }}{% endfor %}]{{ eos_token }}'
    "{% elif m.role == 'tool' %}[TOOL_RESULTS] {\"content\": {{ m.content | tojson }}, \"call_id\": \"{{ m.tool_call_id }}\"}[/TOOL_RESULTS]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
M3 = ("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
MISTRAL_CALL = f'[TOOL_CALLS] [{{"name": "get_time", "arguments": {CALL}, "id": "abc123def"}}]</s>'
MISTRAL7 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT] {{ m.content }}[/SYSTEM_PROMPT]"
    "{% elif m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
FAMILIES += [
    Family("mistral-v1", MISTRAL1, ("<s>", "</s>"), "</s>", (
        case("two turns", TWO, f"<s>[INST] {Q1} [/INST] {A1}</s>[INST] {Q2} [/INST] {A2}</s>", f" {A1}</s>", f" {A2}</s>"),
        Case("system", TOLD, refused="Only user and assistant roles.*merge_system"),
    ), bos="<s>"),
    Family("mixtral", MISTRAL1.replace("'[INST] '", "' [INST] '"), ("<s>", "</s>"), "</s>", (
        case("two turns", TWO, f"<s> [INST] {Q1} [/INST] {A1}</s> [INST] {Q2} [/INST] {A2}</s>", f" {A1}</s>", f" {A2}</s>"),
    ), bos="<s>"),
    Family("mistral-v3", MISTRAL3, M3, "</s>", (
        case("two turns", TWO, f"<s>[INST] {Q1}[/INST] {A1}</s>[INST] {Q2}[/INST] {A2}</s>", f" {A1}</s>", f" {A2}</s>"),
        Case("system", TOLD, (
            Row(f"<s>[INST] {SYS}\n\n{Q1}[/INST] {A1}</s>", (f" {A1}</s>",)),
            Row(f"<s>[INST] {Q1}[/INST] {A1}</s>[INST] {SYS}\n\n{Q2}[/INST] {A2}</s>", (f" {A2}</s>",)),
        )),
        case("call", calling(CALL), f'<s>[AVAILABLE_TOOLS] [{TOOL_JSON}][/AVAILABLE_TOOLS][INST] Time in Rome?[/INST]{MISTRAL_CALL}[TOOL_RESULTS] {{"content": "12:30", "call_id": "abc123def"}}[/TOOL_RESULTS] Half past twelve.</s>', MISTRAL_CALL, " Half past twelve.</s>", tools=[TOOL]),
        Case("tools and two questions", [*calling(CALL), {"role": "user", "content": Q1}, {"role": "assistant", "content": A1}], (
            Row(f'<s>[AVAILABLE_TOOLS] [{TOOL_JSON}][/AVAILABLE_TOOLS][INST] Time in Rome?[/INST]{MISTRAL_CALL}[TOOL_RESULTS] {{"content": "12:30", "call_id": "abc123def"}}[/TOOL_RESULTS] Half past twelve.</s>', (MISTRAL_CALL, " Half past twelve.</s>")),
            Row(f'<s>[INST] Time in Rome?[/INST]{MISTRAL_CALL}[TOOL_RESULTS] {{"content": "12:30", "call_id": "abc123def"}}[/TOOL_RESULTS] Half past twelve.</s>[AVAILABLE_TOOLS] [{TOOL_JSON}][/AVAILABLE_TOOLS][INST] {Q1}[/INST] {A1}</s>', (f" {A1}</s>",)),
        ), tools=[TOOL]),
    ), bos="<s>"),
    Family("mistral-v7", MISTRAL7, (*M3[:4], "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), "</s>", (
        case("system", TOLD, f"<s>[SYSTEM_PROMPT] {SYS}[/SYSTEM_PROMPT][INST] {Q1}[/INST] {A1}</s>[INST] {Q2}[/INST] {A2}</s>", f" {A1}</s>", f" {A2}</s>"),
        case("two turns", TWO, f"<s>[INST] {Q1}[/INST] {A1}</s>[INST] {Q2}[/INST] {A2}</s>", f" {A1}</s>", f" {A2}</s>"),
    ), bos="<s>"),
]  # fmt: skip

# ------------------------------------------------------------------------------------------------ Gemma, Phi, and others with turn tokens
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}SYSTEM{% endif %}{% for m in turns or messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ prefix if loop.first }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA2 = GEMMA.replace("SYSTEM", "{{ raise_exception('System role not supported') }}").replace("turns or messages", "messages").replace("{{ prefix if loop.first }}", "")
GEMMA3 = (
    "{% set told = messages[0].content | trim + '\\n\\n' if messages[0].role == 'system' else '' %}{% set turns = messages[1:] if told else messages %}"
    + GEMMA.replace("{% if messages[0].role == 'system' %}SYSTEM{% endif %}", "").replace("turns or messages", "turns").replace("prefix", "told")
)


def gemma(*turns: str) -> str:
    return "<bos>" + "".join(f"<start_of_turn>{turn}<end_of_turn>\n" for turn in turns)


G = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
P3 = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
ZEPHYR = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
COHERE = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>{{ {'system': '<|SYSTEM_TOKEN|>', 'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}[m.role] }}"
    "{{ m.content | trim }}<|END_OF_TURN_TOKEN|>{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
CO = ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")
GRANITE = (
    "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
FAMILIES += [
    Family("gemma-2", GEMMA2, G, "<eos>", (
        case("two turns", TWO, gemma(f"user\n{Q1}", f"model\n{A1}", f"user\n{Q2}", f"model\n{A2}"), f"{A1}<end_of_turn>", f"{A2}<end_of_turn>"),
        case("padded", chat(" q\n", "\n model "), gemma("user\nq", "model\nmodel"), "model<end_of_turn>"),
        Case("system", TOLD, refused="System role not supported.*merge_system"),
    ), bos="<bos>"),
    Family("gemma-3", GEMMA3, G, "<eos>", (
        case("two turns", TWO, gemma(f"user\n{Q1}", f"model\n{A1}", f"user\n{Q2}", f"model\n{A2}"), f"{A1}<end_of_turn>", f"{A2}<end_of_turn>"),
        case("system", TOLD, gemma(f"user\n{SYS}\n\n{Q1}", f"model\n{A1}", f"user\n{Q2}", f"model\n{A2}"), f"{A1}<end_of_turn>", f"{A2}<end_of_turn>"),
    ), bos="<bos>"),
    Family("phi-3", PHI3, P3, "<|endoftext|>", (
        case("two turns", TWO, f"<|user|>\n{Q1}<|end|>\n<|assistant|>\n{A1}<|end|>\n<|user|>\n{Q2}<|end|>\n<|assistant|>\n{A2}<|end|>\n<|endoftext|>", f"{A1}<|end|>", f"{A2}<|end|>"),
        case("system", chat(Q1, A1, system=SYS), f"<|system|>\n{SYS}<|end|>\n<|user|>\n{Q1}<|end|>\n<|assistant|>\n{A1}<|end|>\n<|endoftext|>", f"{A1}<|end|>"),
    )),
    Family("zephyr", ZEPHYR, ("<s>", "</s>"), "</s>", (
        case("system", TOLD, f"<|system|>\n{SYS}</s>\n<|user|>\n{Q1}</s>\n<|assistant|>\n{A1}</s>\n<|user|>\n{Q2}</s>\n<|assistant|>\n{A2}</s>\n", f"{A1}</s>", f"{A2}</s>"),
    )),
    Family("stablelm-zephyr", ZEPHYR, ("<|endoftext|>",), "<|endoftext|>", (
        case("two turns", TWO, f"<|user|>\n{Q1}<|endoftext|>\n<|assistant|>\n{A1}<|endoftext|>\n<|user|>\n{Q2}<|endoftext|>\n<|assistant|>\n{A2}<|endoftext|>\n", f"{A1}<|endoftext|>", f"{A2}<|endoftext|>"),
    )),
    Family("olmo-2", (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% if not (m.role == 'assistant' and loop.last) %}\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ), ("<|endoftext|>",), "<|endoftext|>", (
        case("two turns", TWO, f"<|endoftext|><|user|>\n{Q1}<|assistant|>\n{A1}<|endoftext|><|user|>\n{Q2}<|assistant|>\n{A2}<|endoftext|>", f"{A1}<|endoftext|>", f"{A2}<|endoftext|>"),
    ), bos="<|endoftext|>"),
    Family("command-r", COHERE, CO, "<|END_OF_TURN_TOKEN|>", (
        case("system", TOLD, "<BOS_TOKEN>" + "".join(f"<|START_OF_TURN_TOKEN|><|{role}_TOKEN|>{text}<|END_OF_TURN_TOKEN|>" for role, text in (("SYSTEM", SYS), ("USER", Q1), ("CHATBOT", A1), ("USER", Q2), ("CHATBOT", A2))), f"{A1}<|END_OF_TURN_TOKEN|>", f"{A2}<|END_OF_TURN_TOKEN|>"),
    ), bos="<BOS_TOKEN>"),
    Family("granite-3", GRANITE, ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"), "<|end_of_text|>", (
        case("system", TOLD, "".join(f"<|start_of_role|>{role}<|end_of_role|>{text}<|end_of_text|>\n" for role, text in (("system", SYS), ("user", Q1), ("assistant", A1), ("user", Q2), ("assistant", A2))), f"{A1}<|end_of_text|>", f"{A2}<|end_of_text|>"),
    )),
    Family("exaone", (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}[|system|][|endofturn|]\n{% endif %}[|{{ m.role }}|]{{ m.content }}"
        "{% if m.role == 'user' %}{{ '\n' }}{% else %}[|endofturn|]{{ '\\n' if not loop.last }}{% endif %}{% endfor %}{% if add_generation_prompt %}[|assistant|]{% endif %}"
    ), ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"), "[|endofturn|]", (
        case("two turns", TWO, f"[|system|][|endofturn|]\n[|user|]{Q1}\n[|assistant|]{A1}[|endofturn|]\n[|user|]{Q2}\n[|assistant|]{A2}[|endofturn|]", f"{A1}[|endofturn|]", f"{A2}[|endofturn|]"),
    )),
    Family("openchat", (
        "{{ bos_token }}{% for m in messages %}GPT4 Correct {{ m.role | title }}: {{ m.content }}<|end_of_turn|>{% endfor %}{% if add_generation_prompt %}GPT4 Correct Assistant:{% endif %}"
    ), ("<s>", "<|end_of_turn|>"), "<|end_of_turn|>", (
        case("two turns", TWO, f"<s>GPT4 Correct User: {Q1}<|end_of_turn|>GPT4 Correct Assistant: {A1}<|end_of_turn|>GPT4 Correct User: {Q2}<|end_of_turn|>GPT4 Correct Assistant: {A2}<|end_of_turn|>", f" {A1}<|end_of_turn|>", f" {A2}<|end_of_turn|>"),
    ), bos="<s>"),
    Family("falcon-3", "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token if m.role == 'assistant' else '\\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}", ("<|endoftext|>",), "<|endoftext|>", (
        case("system", TOLD, f"<|system|>\n{SYS}\n<|user|>\n{Q1}\n<|assistant|>\n{A1}<|endoftext|><|user|>\n{Q2}\n<|assistant|>\n{A2}<|endoftext|>", f"{A1}<|endoftext|>", f"{A2}<|endoftext|>"),
    )),
]  # fmt: skip

# ------------------------------------------------------------------------------------------------ plain words
VICUNA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
ALPACA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n{% elif m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
    "{% else %}### Response:\n{{ m.content }}{{ eos_token }}\n\n{% endif %}{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}"
)
FAMILIES += [
    Family("vicuna", VICUNA, ("<s>", "</s>"), "</s>", (
        case("two turns", TWO, f"<s>USER: {Q1} ASSISTANT: {A1}</s>USER: {Q2} ASSISTANT: {A2}</s>", f" {A1}</s>", f" {A2}</s>"),
        case("system", chat(Q1, A1, system=SYS), f"<s>{SYS} USER: {Q1} ASSISTANT: {A1}</s>", f" {A1}</s>"),
    ), bos="<s>"),
    Family("alpaca", ALPACA, ("</s>",), "</s>", (
        case("two turns", TWO, f"### Instruction:\n{Q1}\n\n### Response:\n{A1}</s>\n\n### Instruction:\n{Q2}\n\n### Response:\n{A2}</s>\n\n", f"{A1}</s>", f"{A2}</s>"),
        case("system", chat(Q1, A1, system=SYS), f"{SYS}\n\n### Instruction:\n{Q1}\n\n### Response:\n{A1}</s>\n\n", f"{A1}</s>"),
    )),
    Family("alpaca without a generation prompt", ALPACA.partition("{% if add_generation_prompt")[0], ("</s>",), "</s>", (
        case("two turns", TWO, f"### Instruction:\n{Q1}\n\n### Response:\n{A1}</s>\n\n### Instruction:\n{Q2}\n\n### Response:\n{A2}</s>\n\n", f"{A1}</s>", f"{A2}</s>"),
    )),
    Family("solar", (
        "{% for m in messages %}### {{ {'system': 'System', 'user': 'User', 'assistant': 'Assistant'}[m.role] }}:\n{{ m.content }}{{ eos_token if m.role == 'assistant' }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
    ), ("</s>",), "</s>", (
        case("system", TOLD, f"### System:\n{SYS}\n\n### User:\n{Q1}\n\n### Assistant:\n{A1}</s>\n\n### User:\n{Q2}\n\n### Assistant:\n{A2}</s>\n\n", f"{A1}</s>", f"{A2}</s>"),
    )),
    Family("end of text only at the very end", (
        "{% for m in messages %}{{ {'user': 'Human: ', 'assistant': 'Bot: '}[m.role] }}{{ m.content }}\n{% if loop.last and m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}Bot: {% endif %}"
    ), ("</s>",), "</s>", (
        Case("two turns", chat("One?", "1", "Two?", "2"), (
            Row("Human: One?\nBot: 1\n</s>", ("1\n</s>",)),
            Row("Human: One?\nBot: 1\nHuman: Two?\nBot: 2\n</s>", ("2\n</s>",)),
        )),
    )),
]  # fmt: skip

# ------------------------------------------------------------------------------------------------ DeepSeek, gpt-oss, GLM, and the refused
DS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>")
DEEPSEEK3 = (
    "{{ bos_token }}{% if tools %}## Tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>"
    "{% else %}{% if messages[loop.index0 - 1].role != 'tool' %}<｜Assistant｜>{% endif %}{{ m.content or '' }}"
    # this family takes the arguments as text
    "{% if m.tool_calls %}<｜tool▁calls▁begin｜>{% for c in m.tool_calls %}<｜tool▁call▁begin｜>{{ c.function.name }}<｜tool▁sep｜>{{ c.function.arguments + '' }}<｜tool▁call▁end｜>{% endfor %}<｜tool▁calls▁end｜>{% endif %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt and messages[-1].role != 'tool' %}<｜Assistant｜>{% endif %}"
)
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% else %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
DS_CALL = f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_time<｜tool▁sep｜>{CALL}<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
OSS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>")
GLM4 = "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
THINKING = [{**m, "thinking": m["reasoning_content"]} if "reasoning_content" in m else m for m in THOUGHT]
THINKING = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in THINKING]
FINAL = "<|channel|>final<|message|>"
FAMILIES += [
    Family("deepseek-v3", DEEPSEEK3, DS, "<｜end▁of▁sentence｜>", (
        case("system", TOLD, f"<｜begin▁of▁sentence｜>{SYS}<｜User｜>{Q1}<｜Assistant｜>{A1}<｜end▁of▁sentence｜><｜User｜>{Q2}<｜Assistant｜>{A2}<｜end▁of▁sentence｜>", f"{A1}<｜end▁of▁sentence｜>", f"{A2}<｜end▁of▁sentence｜>"),
        case("call", calling({"zone": "Europe/Rome"}), f"<｜begin▁of▁sentence｜>## Tools\n{TOOL_JSON}\n<｜User｜>Time in Rome?<｜Assistant｜>{DS_CALL}<｜tool▁output▁begin｜>12:30<｜tool▁output▁end｜>Half past twelve.<｜end▁of▁sentence｜>", DS_CALL, "Half past twelve.<｜end▁of▁sentence｜>", tools=[TOOL]),
    ), bos="<｜begin▁of▁sentence｜>"),
    Family("deepseek-r1", DEEPSEEK_R1, DS[:4], "<｜end▁of▁sentence｜>", (
        Case("plain", TWO, refused="opens a block of reasoning"),
        Case("reasoning is thrown away", chat(Q1, "<think>\nHm.\n</think>\n\n4"), refused="is not what it writes there in training"),
    ), bos="<｜begin▁of▁sentence｜>"),
    Family("gpt-oss", HARMONY, OSS, "<|return|>", (
        Case("two turns", TOLD, (
            Row(f"<|start|>system<|message|>{SYS}<|end|><|start|>user<|message|>{Q1}<|end|><|start|>assistant{FINAL}{A1}<|return|>", (f"{FINAL}{A1}<|return|>",)),
            Row(f"<|start|>system<|message|>{SYS}<|end|><|start|>user<|message|>{Q1}<|end|><|start|>assistant{FINAL}{A1}<|end|><|start|>user<|message|>{Q2}<|end|><|start|>assistant{FINAL}{A2}<|return|>", (f"{FINAL}{A2}<|return|>",)),
        )),
        Case("reasoning", THINKING[:2], (
            Row(f"<|start|>user<|message|>{Q1}<|end|><|start|>assistant<|channel|>analysis<|message|>Two and two.<|end|><|start|>assistant{FINAL}4<|return|>", (f"<|channel|>analysis<|message|>Two and two.<|end|><|start|>assistant{FINAL}4<|return|>",)),
        )),
    )),
    Family("glm-4", GLM4, ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"), "<|user|>", (
        Case("the next turn's header is the stop", TWO, refused="never learn to stop"),
    )),
    Family("drops the system", CHATML.replace("in messages", "in messages if m.role != 'system'"), IM, "<|im_end|>", (
        case("two turns", TWO, PLAIN_TEXT, *TAUGHT),
        Case("system", TOLD, refused="leaves out or changes this system message.*merge_system"),
    )),
    Family("upper case", CHATML.replace("m.content", "m.content | upper"), IM, "<|im_end|>", (Case("two turns", TWO, refused="changes the answer"),)),
    Family("no tools", CHATML, IM, "<|im_end|>", (
        Case("call", calling(CALL), tools=[TOOL], refused="message 2"),
        Case("reasoning", THOUGHT, refused="leaves out reasoning_content"),
    )),
]  # fmt: skip
