"""Fits the growth of the leaves to light and temperature."""

import csv

import numpy as np

# Light enters as a logarithm, since growth hardly changes above 5000 lux.


def load(path="data/clean/shoots_2022.csv"):
    """Site, month and shoots of every frame."""
    with open(path) as file:
        return [(row["site"], int(row["month"]), int(row["shoots"])) for row in csv.DictReader(file)]


def fit(light, warmth, growth):
    """Least squares; the third number is the intercept."""
    a = np.column_stack([np.log(light), warmth, np.ones(len(light))])
    return np.linalg.lstsq(a, growth, rcond=None)[0]


if __name__ == "__main__":
    print(len(load()), "frames")
