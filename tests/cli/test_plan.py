"""`slidetune plan`: the page, the JSON, the files, and every way to get it wrong."""

import json
import re

import pytest
import yaml

from slidetune.machines import machine
from slidetune.models import load_model
from slidetune.plan_file import read_plan
from slidetune.tuner.evaluate import Evaluator

from .commands import refused, slidetune

FIELDS = {
    "tokens_per_s",
    "step_s",
    "bound_s",
    "limiter",
    "gpu_busy",
    "memory",
    "nvme_written_bytes_per_step",
    "trials",
    "plan",
    "whatif",
}


# --- What it gives


def test_json_has_every_field(planned):
    found = planned.json
    assert set(found) >= FIELDS
    assert found["tokens_per_s"] * found["step_s"] == pytest.approx(found["tokens_per_step"])
    assert found["bound_s"] <= found["step_s"] * (1 + 1e-9)
    assert found["trials"] >= 20
    assert set(found["memory"]) == {"gpu", "ram", "nvme"}
    for memory in found["memory"].values():
        assert 0 <= memory["peak_bytes"] <= memory["capacity_bytes"]
    assert {"change", "tokens_per_s", "gain", "plan"} <= set(found["whatif"][0])
    assert found["plan_file"] == "plan.yaml"
    assert any("--host" in phrase for phrase in found["assumed"])


def test_the_plan_file_is_that_plan_with_comments(planned):
    text = (planned.folder / "plan.yaml").read_text()
    held = {name: value for name, value in yaml.safe_load(text).items() if value is not None}
    assert held == planned.json["plan"]
    assert text.startswith("# slidetune: qwen3-0.6b on rtx3060-12g-workstation.\n")
    assert "# Weight slots on the GPU" in text
    whys = list(planned.json["reasons"].values())
    assert whys
    assert all(why.split()[0] in text for why in whys)
    assert text.count("Here: ") == len(whys)
    plan = read_plan(planned.folder / "plan.yaml")
    assert Evaluator(load_model("qwen3-0.6b"), machine("rtx3060-12g", ram_gib=12)).fits(plan)


def test_the_written_plan_simulates_to_the_same_step(planned):
    ran = slidetune("simulate", "plan.yaml", "--gpu", "rtx3060-12g", "--ram", "12", "--json", cwd=planned.folder)
    assert ran.code == 0
    found = json.loads(ran.out)
    for field in ("step_s", "tokens_per_s", "bound_s", "limiter", "memory", "plan", "nvme_written_bytes_per_step"):
        assert found[field] == planned.json[field], field


def test_the_report_is_a_page_with_its_pictures(tmp_path):
    ran = slidetune("plan", "--model", "gpt2", "--trials", "20", "--report", "report", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert "Written: report/index.html" in ran.words
    report = tmp_path / "report"
    assert (report / "index.html").read_text().lower().startswith("<!doctype html>")
    pictures = {path.stem for path in report.glob("*.png")}
    assert pictures >= {"timeline", "lanes", "memory"}
    assert len(pictures) >= 5
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in report.glob("*.png"))


def test_the_trace_is_chromes_with_arrows_between_lanes(planned):
    events = json.loads((planned.folder / "step.json").read_text())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert all(event["dur"] >= 0 and {"name", "ts", "pid", "tid"} <= set(event) for event in slices)
    threads = {event["tid"] for event in events if event["ph"] == "M" and event["name"] == "thread_name"}
    assert {event["tid"] for event in slices} <= threads
    starts = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert starts
    assert set(starts) == set(ends)
    assert all(starts[i]["tid"] != ends[i]["tid"] and starts[i]["ts"] <= ends[i]["ts"] for i in starts)


def test_the_page_a_person_reads(tmp_path):
    ran = slidetune("plan", "--model", "gpt2", "--gpu", "4090", "--trials", "10", cwd=tmp_path, columns=80)
    assert ran.code == 0
    assert ran.err == ""
    assert max(map(len, ran.out.splitlines())) <= 80
    for part in ("Model gpt2", "Machine GeForce RTX 4090", "Assumed", "tokens/s", "Limit", "CPU Adam", "Memory"):
        assert part in ran.words
    assert re.search(r"What would help most|Nothing helps", ran.words)
    assert re.search(r"Search \d+ plans simulated", ran.words)
    assert "plan.yaml" in ran.words
    # What was said is not assumed.
    assert "(--gpu)" not in ran.words
    assert "(--ram)" in ran.words
    assert read_plan(tmp_path / "plan.yaml").model == "gpt2"


def test_what_was_asked_for(tmp_path):
    options = ("--batch", "6", "--clip", "1.5", "--seq-len", "256", "--gpu-memory", "6", "--kernels", "liger")
    ran = slidetune("plan", "--model", "gpt2", *options, "--trials", "8", "--json", "-o", "mine.yaml", cwd=tmp_path)
    assert ran.code == 0, ran.err
    plan = read_plan(tmp_path / "mine.yaml")
    assert (plan.batch, plan.clip_norm, plan.update, plan.seq_len) == (6, 1.5, "forward", 256)
    assert plan.gpu_memory_gib == 6
    assert json.loads(ran.out)["memory"]["gpu"]["capacity_bytes"] < 6 * 2**30
    assert not any("Liger" in row["change"] for row in json.loads(ran.out)["whatif"])


def test_the_same_seed_gives_the_same_plan(tmp_path):
    runs = [slidetune("plan", "--model", "gpt2", "--trials", "8", "--seed", "5", "--json", cwd=tmp_path) for _ in "ab"]
    assert runs[0].out == runs[1].out


def test_a_study_is_shared_and_then_refused_to_another_model(tmp_path):
    shared = ("--storage", "journal:study.journal", "--study", "mine", "--trials", "3", "--json")
    for seed in (0, 1):
        assert slidetune("plan", "--model", "gpt2", *shared, "--seed", seed, cwd=tmp_path).code == 0
    refused(
        "plan", "--model", "qwen3-0.6b", *shared, cwd=tmp_path, saying="study 'mine' in this storage is of something"
    )


def test_a_config_file_is_a_model(tmp_path):
    config = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "vocab_size": 1000, "max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ran = slidetune("plan", "--model", "config.json", "--trials", "5", cwd=tmp_path)
    assert ran.code == 0, ran.err
    # It has fewer positions than a sequence has by default.
    assert "sequences of 512 tokens" in ran.words
    assert slidetune("simulate", "plan.yaml", cwd=tmp_path).code == 0


# --- What it refuses


@pytest.mark.parametrize(
    ("options", "saying"),
    [
        ("--gpu rtx4091", r"unknown GPU 'rtx4091'\. Did you mean rtx4090"),
        ("--model lama-3.1-8b", "Did you mean llama-3.1-8b"),
        ("--model nowhere.json", "nowhere.json: no such file"),
        ("--host workstatoin", "Did you mean workstation"),
        ("--profile h200-16", "Did you mean h200-16c"),
        ("--profile nowhere.yaml", "nowhere.yaml: no such file"),
        ("--profile .", "directory"),
        ("--profile h200-16c --gpu rtx4099", "Did you mean rtx4090"),
        ("--profile h200-16c --host server", "--host can't be given with it"),
        ("--nvme 2TB", r"--nvme '2TB' is not SIZE:READ/WRITE\. Example: 2TB:7/5"),
        ("--nvme 2TB:0/5", "must be above zero"),
        ("--link pcie9x16", "Examples: pcie4x16"),
        ("--ram -4", "--ram -4: must be above zero"),
        ("--ram 3", "leaves no RAM to use"),
        ("--ram lots", "valid number"),
        ("--cores 0", "--cores 0: must be at least 1"),
        ("--dram-bw nan", "--dram-bw nan"),
        ("--gpu-memory 100", "not between 1 GiB and the 23.99 GiB"),
        ("--kernels fast", "unknown kernels 'fast'. Known: eager, liger"),
        ("--model gpt2 --seq-len 1025", "--seq-len 1025 is not between 1 and the 1024 positions of gpt2"),
        ("--seq-len 0", "--seq-len 0 is not between"),
        ("--batch 0", "--batch 0: must be at least 1"),
        ("--clip -1", "--clip -1: must be a number above 0"),
        ("--objective fastest", "unknown objective 'fastest'. Known: throughput, ram, nvme-writes"),
        ("--trials 0", "--trials 0: must be at least 1"),
        ("--trials many", "valid integer"),
        ("--storage foo://bar", "--storage 'foo://bar' cannot be opened"),
        ("--output .", "is a directory"),
        ("--output missing/plan.yaml", "there is no directory missing"),
        ("--trace missing/step.json", "there is no directory missing"),
        ("--report plan.txt --model gpt2 --trials 2", "plan.txt"),
    ],
)
def test_mistakes(tmp_path, options, saying):
    (tmp_path / "plan.txt").write_text("a file, not a directory")
    refused("plan", *options.split(), cwd=tmp_path, saying=saying)


def test_a_model_that_cannot_fit(tmp_path):
    asked = ("plan", "--model", "qwen3-4b", "--gpu", "rtx3060-12g", "--ram", "24")
    ran = refused(*asked, "--nvme", "none", cwd=tmp_path, saying=r"overflows RAM by .* bytes\): it needs")
    ram = re.search(r"--ram (\d+)", ran.words)[1]
    drive = re.search(r"--nvme (\S+)\)", ran.words)[1]
    for remedy in (("--ram", ram, "--nvme", "none"), ("--nvme", drive)):
        ran = slidetune(*asked, *remedy, "--trials", "1", cwd=tmp_path)
        assert ran.code == 0, (remedy, ran.err)
    assert "TB written to NVMe per 1000 steps" in ran.words
