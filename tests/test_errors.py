"""How errors leave a tool: exit codes, and what a person reads."""

import os
import subprocess
import sys

import pytest
import torch

from maedistill.errors import ConfigError, DataError, NumericsError, PeerError, Preempted, UserError, exit_code_of


@pytest.mark.parametrize(
    ("kind", "code"), [(UserError, 2), (ConfigError, 2), (DataError, 3), (NumericsError, 4), (PeerError, 5)]
)
def test_an_error_is_two_lines_and_a_code(kind, code, capsys):
    def main():
        raise kind("what is wrong", "what to do")

    assert exit_code_of(main) == code
    assert capsys.readouterr() == ("", "error: what is wrong\n  fix: what to do\n")


def test_names_from_outside_stay_on_their_line(capsys):
    def main():
        raise DataError("a\nfile\x1b[31m named \u202eoddly, bär", "remove it")

    assert exit_code_of(main) == 3
    assert capsys.readouterr().err == "error: a\\nfile\\x1b[31m named \\u202eoddly, bär\n  fix: remove it\n"


def test_a_stop_on_request_is_one_line_and_no_error(capsys):
    def main():
        raise Preempted("SIGUSR1", 120)

    assert not issubclass(Preempted, UserError)  # nobody's mistake: what catches those must not catch this
    assert exit_code_of(main) == 75
    assert capsys.readouterr() == (
        "",
        "stopped by SIGUSR1 after step 120, which is saved; the same command continues from there\n",
    )


CUDA_ERRORS = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"), 2, "engine.micro_batch"),
    (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nmore"), 5, "newest checkpoint"),
]


@pytest.mark.parametrize(("error", "code", "remedy"), CUDA_ERRORS)
def test_what_a_gpu_raises_is_two_lines_and_a_code(error, code, remedy, capsys):
    def main():
        raise error

    assert exit_code_of(main) == code
    cause, fix = capsys.readouterr().err.splitlines()
    assert str(error).splitlines()[0] in cause and remedy in fix
    with pytest.raises(RuntimeError, match="shapes"):
        exit_code_of(lambda: torch.ones(2) @ torch.ones(3, 3))


LEAVES = {
    "pass": 0,
    "raise DataError('what is wrong', 'what to do')": 3,
    "raise KeyError('a bug')": 1,
    "argparse.ArgumentParser().parse_args(['--no'])": 2,
    "raise KeyboardInterrupt": 130,
}


@pytest.mark.parametrize(("what", "code"), LEAVES.items())
def test_a_tool_leaves_without_teardown_whatever_happens(what, code):
    program = f"""
import argparse, atexit, sys
from maedistill.errors import DataError, leave
atexit.register(print, "torn down")
def main():
    print("began")
    {what}
leave(main)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (code, "began\n")
    assert ("Traceback" in ended.stderr) == (code == 1)


@pytest.mark.parametrize(
    ("what", "code"), [*LEAVES.items(), ("raise Preempted('SIGTERM', 3)", 75), ("pass; print(1, flush=True)", 141)]
)
def test_a_reader_that_has_left_changes_no_exit_code(what, code):
    reader, writer = os.pipe()
    os.close(reader)
    program = f"""
import argparse
from maedistill.errors import DataError, Preempted, leave
def main():
    {what}
leave(main)
"""
    ended = subprocess.run([sys.executable, "-c", program], stdout=writer, stderr=writer)
    os.close(writer)
    assert ended.returncode == code


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("word", "code"), [("--version", 0), ("nonsense", 2)])
def test_a_closed_stream_changes_no_exit_code_and_nothing_else_gets_its_number(word, code, closed):
    words = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "maedistill", word]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode == code and "Traceback" not in ended.stderr
    assert ended.stderr.count("error: ") == (code == 2 and "2>" not in closed)
