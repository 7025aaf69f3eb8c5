"""A run in a process of its own, with keys planted wherever keys lie, and every connection written down: see test_secrets.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

# in two parts, or the scanners that look for leaked secrets would find them here
PLANTED = {
    "HF_TOKEN": "hf_" + "CanaryEnvHub0123456789abcdefgh",
    "WANDB_API_KEY": "c0ffee" * 6 + "beef",
    "OPENAI_API_KEY": "sk-" + "canary0123456789ABCDEFGHIJ",
    "MY_DB_PASSWORD": "Canary-Of-The-Database-7",
    "MLFLOW_TRACKING_URI": "Canary-Mlflow-Pass-8",
    "HTTPS_PROXY": "Canary-Proxy-Pass-9",
    "hub login": "hf_" + "CanaryLogin0123456789abcdefghij",
    "stored tokens": "hf_" + "CanaryStored123456789abcdefghij",
    "netrc": "Canary-Netrc-Pass-10",
    "git remote": "ghp_" + "CanaryRemote0123456789abcdefghijklmn",
    "git credentials": "Canary-Gitcred-11",
    "exception": "github_pat_" + "CanaryException0123456789",
}
SCRIPT = """
import json, sys, os
connections = []
def hook(event, args):
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        connections.append([event, str(args[1:])[:100]])
sys.addaudithook(hook)
from pathlib import Path
from transformers import TrainerCallback
from finetune_nb import FinetuneConfig, train, load_run, diagnose, list_runs, evaluate_run, write_report
from finetune_nb.data import Chat, split_chats
from finetune_nb.jobs import start_job
exception = json.loads(os.environ.pop("CANARIES"))
def chat(i):
    return Chat([{"role": "user", "content": f"What is {i} plus one?"}, {"role": "assistant", "content": f"It is {i + 1}."}], f"c, line {i}")
splits = split_chats([chat(i) for i in range(40)], validation_size=0.2, test_size=0.1, seed=1)
config = FinetuneConfig(model_name_or_path=sys.argv[1], bf16=False, use_cpu=True, num_train_epochs=1, output_dir="runs", max_new_tokens=4)
run = train(config, splits)
evaluate_run(run)
write_report(run)
print(run, diagnose(run), list_runs("runs"))
class Fails(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise RuntimeError("could not reach https://me:" + exception["MY_DB_PASSWORD"] + "@host with " + " ".join(exception.values()))
try:
    train(config, splits, [Fails()])
except RuntimeError as error:
    import traceback
    print(error, repr(error), traceback.format_exc())  # as a notebook and a script show it
else:
    raise SystemExit("it did not fail")
job = start_job(config, splits, background=False, callbacks=[Fails()])
print(job.error, job.trace, job.lines)
from finetune_nb.train_view import job_words
print(job_words(job, details=True))
for value in exception.values():
    try:
        FinetuneConfig(run_name=value)
    except ValueError as error:
        print(error)
    else:
        raise SystemExit("a key became a setting")
    try:
        FinetuneConfig(num_train_epochs=value)
    except ValueError as error:
        print(error)
Path("connections.json").write_text(json.dumps(connections))
"""


def run_with_canaries(folder: Path, model: str, offline: bool) -> subprocess.CompletedProcess:
    "Plants, trains, fails, reports; all in `folder`, with the home folder beside it."
    home, work = folder / "home", folder / "work"
    for place in (home / "hf", work / ".git"):
        place.mkdir(parents=True)
    (home / "hf" / "token").write_text(PLANTED["hub login"])
    (home / "hf" / "stored_tokens").write_text(f"[a]\nhf_token = {PLANTED['stored tokens']}\n")
    (home / ".netrc").write_text(f"machine h login l password {PLANTED['netrc']}\n")
    (home / ".git-credentials").write_text(f"https://me:{PLANTED['git credentials']}@github.com\n")
    (work / ".git" / "config").write_text(f'[remote "origin"]\n\turl = https://{PLANTED["git remote"]}@github.com/a/b\n')
    environment = {k: v for k, v in os.environ.items() if k in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "LANG")}
    environment |= {name: PLANTED[name] for name in PLANTED if name.isupper()}
    environment |= {"MLFLOW_TRACKING_URI": f"https://me:{PLANTED['MLFLOW_TRACKING_URI']}@tracking", "HTTPS_PROXY": f"http://me:{PLANTED['HTTPS_PROXY']}@proxy:1"}
    environment |= {"HOME": str(home), "HF_HOME": str(home / "hf"), "CANARIES": json.dumps(PLANTED), "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, "-c", SCRIPT, model], cwd=work, env=environment, capture_output=True, text=True, timeout=300)
