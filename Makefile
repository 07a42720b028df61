# Two commands on a machine that has only Python: `make plan` plans, `make test` checks everything.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: plan run test lint format clean

plan: $(VENV)/planner.stamp
	$(BIN)/slidetune plan --gpu rtx4090

# A small model, random weights, on the CPU: nothing is downloaded.
run: $(VENV)/everything.stamp
	$(BIN)/slidetune profile --quick --device cpu --model gpt2 --output run-profile.yaml
	$(BIN)/slidetune plan --profile run-profile.yaml --model gpt2 --seq-len 128 --batch 2 --trials 40 --output run-plan.yaml
	$(BIN)/slidetune run run-plan.yaml --random-weights --device cpu --steps 5 --profile run-profile.yaml --trace run-trace.json

test: lint
	$(BIN)/python -m pytest --numprocesses auto --durations 10

lint: $(VENV)/everything.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/everything.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The planner alone is light: no torch.
$(VENV)/planner.stamp: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

# torch first: its version is held, whatever transformers would take.
$(VENV)/everything.stamp: $(VENV)/planner.stamp
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[runtime,dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
