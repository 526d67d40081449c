"""The help of a command with many options, in sections: what is asked, of whom, how it is judged, where it goes.

It knows click's way to write help. It must not know what any option does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import click

REST = "Options"


class SectionedCommand(click.Command):
    """Its parameters by sections; those that are in none come last."""

    def sections(self) -> Sequence[tuple[str, Collection[str]]]:
        """Titles and names of parameters, in the order of the help."""
        return ()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections = self.sections()
        rows: dict[str, list[tuple[str, str]]] = {title: [] for title, _ in sections}
        rows[REST] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                owned = (title for title, names in sections if parameter.name in names)
                rows[next(owned, REST)].append(record)
        for title, found in rows.items():
            if found:
                with formatter.section(title):
                    formatter.write_dl(found)
