# Two commands do everything on a fresh machine with Python 3.10 or newer:
#
#   make demo   the main job on the embedded model and data, with a before/after table at the end
#   make test   the whole test suite
#
# Both make an environment in .venv first and reuse it afterwards.
# ARGS passes words on:  make demo ARGS="--chats 200"   make test ARGS="-k config"

VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: help demo test build docs clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -8

demo:
	@sh .ci/environment $(VENV) demo
	@$(BIN)/finetune_nb demo $(ARGS)

test:
	@sh .ci/environment $(VENV) test
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 $(ARGS)

# After editing a notebook: the package, the clean notebooks and the README.
build:
	@sh .ci/environment $(VENV) test
	@$(BIN)/python .ci/build.py

docs:
	@sh .ci/environment $(VENV) test
	@command -v quarto >/dev/null || { echo "The docs site is rendered by Quarto, which is not on the PATH; get it from quarto.org."; exit 1; }
	@PYTHONPATH="$(abspath .ci)" PATH="$(abspath $(BIN)):$$PATH" nbdev_docs

clean:
	rm -rf $(VENV) demo _proc _docs build dist *.egg-info
