"""`ldm schedulers`: the ways to step from noise to picture."""


def schedulers() -> None:
    """List the schedulers, their other names and what they are."""
    from rich.console import Console
    from rich.table import Table

    from ldm.schedulers import SCHEDULERS

    table = Table("name", "also known as", "what it is", box=None, header_style="bold", pad_edge=False)
    for row in SCHEDULERS.values():
        table.add_row(row.name, ", ".join((*row.aliases, row.diffusers_class)), row.description)
    Console(markup=False, highlight=False).print(table)
