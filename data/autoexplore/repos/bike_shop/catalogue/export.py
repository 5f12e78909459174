"""Write the catalogue for the price comparison sites."""

import csv


def export_catalogue(items, file):
    csv.writer(file).writerows(items)
