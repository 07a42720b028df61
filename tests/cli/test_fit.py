"""`slidetune fit`: which models a machine can train."""

import json

from slidetune.plans import Plan

from .commands import refused, slidetune

TWO = ("--model", "gpt2", "--model", "llama-3.1-70b", "--trials", "4")


def test_the_table(tmp_path):
    ran = slidetune("fit", *TWO, "--gpu", "rtx3060-12g", "--nvme", "none", "--seq-len", "2048", cwd=tmp_path)
    assert (ran.code, ran.err) == (0, "")
    lines = [line for line in ran.out.splitlines() if line.startswith(("gpt2", "llama"))]
    assert "tokens/s" in ran.words.casefold()
    assert lines[0].endswith("GiB")
    assert "does not fit: too little RAM" in lines[1]
    # GPT-2 has fewer positions than were asked for.
    assert "With shorter sequences, having no more positions: gpt2 (1024 tokens)" in ran.words


def test_no_figure_is_cut_on_a_narrow_terminal(tmp_path):
    ran = slidetune("fit", "--model", "mistral-nemo-12b", "--trials", "4", "--ram", "64", cwd=tmp_path, columns=80)
    assert ran.code == 0
    assert "…" not in ran.out


def test_json(tmp_path):
    found = json.loads(slidetune("fit", *TWO, "--host", "server", "--json", cwd=tmp_path).out)
    gpt2, llama = found["models"]
    assert (gpt2["model"], gpt2["fits"], gpt2["lacking"], gpt2["seq_len"]) == ("gpt2", True, None, 1024)
    assert gpt2["worth"]["tokens_per_s"] > 0
    assert Plan(model=gpt2["plan"]["model"], seq_len=gpt2["plan"]["seq_len"]).seq_len == 1024
    assert llama["params"] > 70e9
    assert any("sequences of 1024 tokens" in phrase for phrase in found["assumed"])


def test_mistakes(tmp_path):
    for arguments, saying in (
        (("--model", "gtp2"), "unknown model 'gtp2'. Did you mean gpt2"),
        (("--trials", "0"), "--trials 0: must be at least 1"),
        (("--seq-len", "0"), "--seq-len 0: must be at least 1"),
        (("--gpu", "rtx"), "unknown GPU 'rtx'"),
    ):
        refused("fit", *arguments, cwd=tmp_path, saying=saying)
