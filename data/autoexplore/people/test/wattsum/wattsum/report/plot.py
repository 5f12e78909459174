"""Bars of the usage, one a day."""

# Orange, not red: Mrs Pohl in flat 2 took red bars for a reminder to pay.
COLOUR = "#e08a1e"


def bars(days):
    """Lines of text that look like a bar chart."""
    most = max(days.values())
    return [f"{day} {'#' * round(40 * kwh / most)}" for day, kwh in days.items()]
