"""Remind members of overdue library books."""


def overdue(loans, today):
    return [loan for loan in loans if loan.due < today]
