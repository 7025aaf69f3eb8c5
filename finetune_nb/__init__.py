"""Chats in, a trustworthy fine-tuned model out. Names are imported when they are first used: `import finetune_nb` is quick."""

__version__ = "0.1.0"

import logging as _logging
from importlib import import_module as _import_module
from typing import Any as _Any

_WHERE = {
    "config": "FinetuneConfig FinetuneError load_config save_config changed_settings",
    "data": "Chat DataReport Splits check_chats check_leaks load_chats save_chats split_chats icd10_chats",
    "chat_template": "check_template neutralise merge_system tokenize_chat tokenize_chats show_labels",
    "origin": "trust_remote_code",
    "models": "load_model load_tokenizer hardware",
    "lora": "add_lora load_adapter trainable_parameters find_target_modules",
    "planning": "estimate",
    "training": "train resume load_run Run",
    "evaluation": "evaluate evaluate_run compare generate pattern_checks",
    "jobs": "start_job continue_job",
    "runs": "list_runs",
    "chat": "ask",
    "forgetting": "measure_forgetting",
    "lm_eval_tasks": "lm_eval",
    "diagnosis": "diagnose",
    "fitting": "measure_fitting",
    "report": "write_report",
    "baselines": "should_you_finetune add_tuned",
    "adapter": "save_adapter",
    "merge": "merge_adapter",
    "gguf_file": "export_gguf",
    "modelfile": "write_modelfile",
    "verify": "verify_export",
    "model_card": "write_model_card",
    "upload": "upload_export",
    "export": "export_run",
}
_MODULE = {name: module for module, names in _WHERE.items() for name in names.split()}
__all__ = list(_MODULE)


# bitsandbytes asks for a package that is no requirement, once for each process and in red
_logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))


def __getattr__(name: str) -> _Any:
    if name in _MODULE:
        return getattr(_import_module(f"finetune_nb.{_MODULE[name]}"), name)
    raise AttributeError(f"module 'finetune_nb' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
