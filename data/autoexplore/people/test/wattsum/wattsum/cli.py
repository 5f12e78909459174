"""The command line."""

import click

from wattsum import gaps, tariff
from wattsum.readers import csv_reader
from wattsum.report import table


@click.command()
@click.argument("path")
@click.option("--month", help="YYYY-MM; without it, the month before this one")
@click.option("--flat", type=int)
def main(path, month, flat):
    """Print the usage of one month."""
    readings = csv_reader.read(path)
    if not readings:
        raise SystemExit(3)
    # A warning only: tenants complained when the program refused to work in the month of the power cut.
    for start, end in gaps.find(readings):
        click.echo(f"no readings from {start} to {end}", err=True)
    click.echo(table.render(tariff.price(readings), month, flat))
