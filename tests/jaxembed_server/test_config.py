"""Settings: flags before the environment before defaults; an error names key, value and what is allowed."""

import dataclasses
from pathlib import Path

import pytest

from jaxembed_server.cli import main, parser
from jaxembed_server.config import ConfigError, ServerConfig, from_sources


def test_flags_win_over_the_environment_which_wins_over_defaults() -> None:
    assert from_sources({}, {}).port == 8000
    assert from_sources({}, {"JAXEMBED_PORT": "1"}).port == 1
    assert from_sources({"port": "2"}, {"JAXEMBED_PORT": "1"}).port == 2
    assert from_sources({}, {"JAXEMBED_PORT": ""}).port == 8000


def test_every_kind_of_value() -> None:
    config = from_sources(
        {
            "model": "folder",
            "api_key": "a, b",
            "served_model_name": "x,y",
            "cache_dir": "c",
            "matryoshka_dimensions": "256,128",
            "access_log": "true",
            "request_timeout": "2.5",
        },
        {},
    )
    assert config.api_key == ("a", "b")
    assert config.names == ("x", "y")
    assert config.cache_dir == Path("c")
    assert config.matryoshka_dimensions == (256, 128)
    assert config.access_log is True
    assert config.request_timeout == 2.5
    assert from_sources({"matryoshka_dimensions": "any"}, {}).matryoshka_dimensions == ()


def test_the_model_is_its_own_name_by_default() -> None:
    assert from_sources({"model": "folder"}, {}).names == ("folder",)


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("port", "x", "0 to 65535"),
        ("port", "70000", "0 to 65535"),
        ("max_length", "0", "at least 1"),
        ("max_body_bytes", "1.5", "at least 1"),
        ("request_timeout", "-1", "positive"),
        ("request_timeout", "nan", "positive"),
        ("dtype", "int8", "float32, bfloat16"),
        ("matryoshka", "maybe", "strict, warn, off"),
        ("matryoshka_dimensions", "0", "at least 1"),
        ("matryoshka_dimensions", "a,b", "at least 1"),
        ("served_model_name", ",", "names"),
        ("access_log", "maybe", "true or false"),
        ("log_level", "loud", "debug, info"),
    ],
)
def test_an_impossible_value_is_named(name: str, text: str, allowed: str) -> None:
    with pytest.raises(ConfigError, match=allowed) as refused:
        from_sources({name: text}, {})
    assert f"--{name.replace('_', '-')} is {text!r}" in str(refused.value)
    with pytest.raises(ConfigError, match=f"JAXEMBED_{name.upper()} is"):
        from_sources({}, {f"JAXEMBED_{name.upper()}": text})


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(["serve", "--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(ServerConfig):
        assert (f"--{field.name.replace('_', '-')}" in shown) or field.name == "model"
        assert " ".join(field.metadata["help"].split()[:3]) in shown


def test_a_flag_without_a_value_is_true() -> None:
    assert vars(parser().parse_args(["serve", "--access-log"]))["access_log"] == "true"


def test_the_command_line_exits_with_2_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "x"]) == 2
    assert "--port is 'x'; allowed: a port from 0 to 65535" in capsys.readouterr().err
