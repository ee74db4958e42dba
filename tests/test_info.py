"""python -m shampoo_kernels: info, and what is said about wrong or impossible commands."""

import json
import subprocess
import sys
import types

import pytest
import torch

import shampoo_kernels
from shampoo_kernels import native
from shampoo_kernels.__main__ import main
from shampoo_kernels.commands import COMMANDS


def test_info_names_every_op_and_what_serves_it(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"torch            {torch.__version__}\n" in text
    table = text[text.index("\nbackends (float32: ") :].splitlines()[2:]
    expected = [
        (device, served.backend)
        for row in shampoo_kernels.backends().values()
        for device, served in row.items()
    ]
    assert [tuple(line[24:].split()[:2]) for line in table] == expected
    for op in shampoo_kernels.backends():
        assert any(line.startswith(f"  {op} ") for line in table)


def test_info_json_is_the_same_facts(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["machine"]["threads"] == torch.get_num_threads()
    for op, row in shampoo_kernels.backends().items():
        for device, served in row.items():
            assert facts["backends"][op][device] == served._asdict()


def test_info_says_why_there_is_no_library(capsys, monkeypatch):
    monkeypatch.setattr(native, "lib", None)
    monkeypatch.setattr(native, "why_not", "not built: no C++ compiler")
    assert main(["info"]) == 0
    assert "  library          not built: no C++ compiler\n" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m shampoo_kernels {command} ")


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["info", "--nonsense"]])
def test_wrong_usage_exits_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "python -m shampoo_kernels" in capsys.readouterr().err


def test_a_missing_extra_says_what_to_install(monkeypatch, capsys):
    def run(args):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    demo = types.SimpleNamespace(add_arguments=lambda parser: None, run=run)
    monkeypatch.setitem(sys.modules, "shampoo_kernels.commands.demo", demo)
    assert main(["demo"]) == 2
    expected = (
        "demo needs matplotlib, which is not installed: pip install 'shampoo_kernels[demo]'\n"
    )
    assert capsys.readouterr().err == expected


def test_an_interrupted_command_is_one_line(monkeypatch, capsys):
    def run(args):
        raise KeyboardInterrupt

    demo = types.SimpleNamespace(add_arguments=lambda parser: None, run=run)
    monkeypatch.setitem(sys.modules, "shampoo_kernels.commands.demo", demo)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "demo: interrupted\n"


def test_our_own_missing_module_is_not_explained_away(monkeypatch):
    monkeypatch.setitem(sys.modules, "shampoo_kernels.commands.info", None)
    with pytest.raises(ModuleNotFoundError):
        main(["info"])


def test_info_needs_no_extra():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['matplotlib', 'sklearn', 'tqdm']))\n"
        "from shampoo_kernels.__main__ import main; sys.exit(main(['info']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
