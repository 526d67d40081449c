"""A flag for every setting of a class of settings. It must not know what any setting is for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dualtrace.settings import SettingField, list_settings

Function = Callable[..., Any]

METAVARS = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "FILE"}


def setting_options(settings: type) -> Callable[[Function], Function]:
    """A flag for every setting of that class, in their order."""

    def add(function: Function) -> Function:
        for field in reversed(list_settings(settings)):
            function = _setting_option(field)(function)
        return function

    return add


def pop_flags(settings: type, given: dict[str, Any]) -> dict[str, object]:
    """Take the settings' flags out of what a command was given."""
    return {field.name: given.pop(field.name) for field in list_settings(settings)}


def _setting_option(field: SettingField) -> Callable[[Function], Function]:
    """Values stay text: `read_settings` parses and refuses them as it does those of a file or the environment."""
    allowed = f"; {field.allowed}" if field.allowed and field.kind is not bool else ""
    text = f"{field.meaning[0].upper()}{field.meaning[1:]} [default: {field.show(field.default)}{allowed}]"
    if field.kind is bool:
        return click.option(f"{field.flag}/--no-{field.flag[2:]}", field.name, default=None, help=text)
    return click.option(field.flag, field.name, default=None, metavar=METAVARS[field.kind], help=text)
