"""The plain text table."""


def render(total, month, flat):
    """One line for a flat, all of them without one."""
    who = f"flat {flat}" if flat else "the house"
    # Right-aligned because the caretaker pastes it into a letter.
    return f"{month or 'last month':<12}{who:<12}{total:>10} EUR"
