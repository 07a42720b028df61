"""`slidetune simulate` and `slidetune report`: plans as written, edited, misspelt, and too large."""

import gzip
import json
import re

import pytest

from .commands import refused, slidetune

SMALL = "model: qwen3-0.6b\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "plan.yaml").write_text(SMALL + "micro_batch: 2\n")
    return tmp_path


def test_the_page(folder):
    ran = slidetune("simulate", "plan.yaml", "--gpu", "4090", "--host", "desktop", cwd=folder, columns=80)
    assert (ran.code, ran.err) == (0, "")
    assert max(map(len, ran.out.splitlines())) <= 80
    assert "a step of 2 sequences (2,048 tokens), likely" in ran.words
    for part in ("Limit", "GPU compute", "Memory", "What would help most", "no NVMe", "a 2 TB NVMe drive"):
        assert part in ran.words


def test_an_edited_plan_is_another_step(folder):
    steps = []
    for batch in (1, 8):
        (folder / "plan.yaml").write_text(SMALL + f"micro_batch: {batch}  # as I like\n")
        steps.append(json.loads(slidetune("simulate", "plan.yaml", "--json", cwd=folder).out)["step_s"])
    assert steps[0] < steps[1]


def test_a_trace_may_be_compressed(folder):
    ran = slidetune("simulate", "plan.yaml", "--trace", "step.json.gz", cwd=folder)
    assert "Written: step.json.gz" in ran.words
    assert json.loads(gzip.decompress((folder / "step.json.gz").read_bytes()))["traceEvents"]


def test_a_published_policy(folder):
    asked = ("simulate", "--policy", "slideformer", "--model", "qwen3-8b", "--batch", "8", "--seq-len", "1024")
    machines = (("--gpu", "rtx4090"), ("--profile", "slideformer-rtx4090"))
    assumed, fitted = (json.loads(slidetune(*asked, *machine, "--json", cwd=folder).out) for machine in machines)
    for found in (assumed, fitted):
        assert found["tokens_per_step"] == 8192
        assert found["plan"] is None
        assert found["step_s"] >= found["bound_s"]
    assert (assumed["machine"], fitted["machine"]) == ("rtx4090-workstation", "slideformer-rtx4090")
    # A profile is a whole machine: nothing about it is taken for granted.
    assert fitted["assumed"] == []
    page = slidetune("simulate", "--policy", "slideformer", "--model", "qwen3-0.6b", cwd=folder)
    assert "a step (1,024 tokens)" in page.words


@pytest.mark.parametrize(
    ("text", "saying"),
    [
        ("model: qwen3-0.6b\nmicrobatch: 3\n", "plan.yaml: microbatch is not a known field; did you mean micro_batch"),
        ("model: qwen3-0.6b\nmicro_batch: three\n", "plan.yaml: micro_batch is 'three'; should be a valid integer"),
        ("model: qwen3-0.6b\nmicro_batch: 2.5\n", "plan.yaml: micro_batch is 2.5"),
        ("model: qwen3-0.6b\nupdate: sideways\n", "allowed: 'backward' or 'forward'"),
        (
            "model: qwen3-0.6b\nactivations: {gpu: 1, nvm: 2}\n",
            "activations.nvm is not a known field; did you mean nvme",
        ),
        ("model: qwen3-0.6b\nversion: 2\n", "this slidetune reads version 1"),
        ("micro_batch: 2\n", "model is missing"),
        ("model: qwen3-0.9b\n", "plan.yaml: unknown model 'qwen3-0.9b'. Did you mean qwen3-0.6b"),
        ("model: qwen3-0.6b\nprefetch: 2\n", r"prefetch \(2\) must be below window \(2\)"),
        ("model: qwen3-0.6b\nresident_layers: 29\n", r"resident_layers \(29\) exceeds the model's 28 layers"),
        ("model: qwen3-0.6b\nclip_norm: 1\n", "clip_norm needs update: forward"),
        ("model: qwen3-0.6b\ngpu_memory_gib: 0.5\n", "plan.yaml: .*0.5 GiB is not between 1 GiB"),
        ("model: [\n", "line 2: not YAML"),
        ("- 1\n", "holds a list"),
        ("", "the file is empty"),
    ],
)
def test_files_that_are_no_plan(folder, text, saying):
    (folder / "plan.yaml").write_text(text)
    refused("simulate", "plan.yaml", cwd=folder, saying=saying)


@pytest.mark.parametrize(
    ("arguments", "saying"),
    [
        ("simulate", "Give a plan file, or --policy"),
        ("simulate nowhere.yaml", "nowhere.yaml: no such file"),
        ("simulate .", "directory"),
        ("simulate plan.yaml --batch 4", "--batch goes with --policy"),
        ("simulate plan.yaml --model gpt2", "--model goes with --policy"),
        ("simulate plan.yaml --policy slideformer", "can't be given together"),
        ("simulate plan.yaml --trace missing/step.json", "missing"),
        ("simulate plan.yaml --profile plan.yaml", "plan.yaml: .* is not a known field"),
        ("simulate --policy zero", "unknown policy 'zero'. Known: slideformer"),
        ("simulate --policy slideformer --batch 0", "must be at least 1"),
        ("simulate --policy slideformer --seq-len 0", "must be at least 1"),
        ("simulate --policy slideformer --model gpt2 --seq-len 2000", "exceeds the model's 1024 positions"),
        ("report", "Missing argument"),
        ("report nowhere.yaml", "nowhere.yaml: no such file"),
        ("report plan.yaml --output plan.yaml", "plan.yaml"),
    ],
)
def test_mistakes(folder, arguments, saying):
    refused(*arguments.split(), cwd=folder, saying=saying)


def test_a_plan_that_does_not_fit_says_what_would(folder):
    (folder / "plan.yaml").write_text(SMALL + "micro_batch: 512\n")
    on = ("--gpu", "rtx3060-12g", "--json")
    ran = refused(
        "simulate", "plan.yaml", *on, cwd=folder, saying=r"overflows GPU memory by [\d.,]+ GiB \([\d,]+ bytes\)"
    )
    assert "most of it working set" in ran.words
    cut = re.search(r"micro_batch: (\d+) with accumulation: (\d+) \(the same batch\)", ran.words)
    (folder / "plan.yaml").write_text(SMALL + f"micro_batch: {cut[1]}\naccumulation: {cut[2]}\n")
    ran = slidetune("simulate", "plan.yaml", *on, cwd=folder)
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["tokens_per_step"] == 512 * 1024


def test_a_policy_that_does_not_fit_names_a_batch(folder):
    asked = ("simulate", "--policy", "slideformer", "--model", "qwen3-0.6b")
    ran = refused(*asked, "--batch", "4000", cwd=folder, saying="slideformer's step of 4000 sequences")
    batch = re.search(r"--batch (\d+)", ran.words)[1]
    assert slidetune(*asked, "--batch", batch, cwd=folder).code == 0


def test_report(folder):
    ran = slidetune("report", "plan.yaml", "--trace", "step.json", cwd=folder)
    assert (ran.code, ran.err) == (0, "")
    assert "Written: report/index.html Written: step.json" in ran.words
    page = (folder / "report" / "index.html").read_text()
    assert "qwen3-0.6b" in page
    assert {path.name for path in (folder / "report").iterdir()} >= {"index.html", "timeline.png", "memory.png"}
    assert json.loads((folder / "step.json").read_text())["traceEvents"]
