"""What a taxi map says, worked out without the project's code: an own parser, own walls, own breadth-first search."""

import collections

# Pairs of cells with a wall between them, read off the picture in Dietterich (2000), figure 1.
WALLS = {
    frozenset(pair)
    for pair in (
        ((0, 1), (0, 2)),
        ((1, 1), (1, 2)),
        ((3, 0), (3, 1)),
        ((4, 0), (4, 1)),
        ((3, 2), (3, 3)),
        ((4, 2), (4, 3)),
    )
}
PLACES = {"R": (0, 0), "G": (0, 4), "Y": (4, 0), "B": (4, 3)}
DIRECTIONS = {"south": (1, 0), "north": (-1, 0), "east": (0, 1), "west": (0, -1)}
MENU = ("move south", "move north", "move east", "move west", "pick up the passenger", "drop off the passenger")


def neighbour(cell, direction):
    """The next cell, or None behind a wall or the border."""
    to = (cell[0] + DIRECTIONS[direction][0], cell[1] + DIRECTIONS[direction][1])
    inside = 0 <= to[0] < 5 and 0 <= to[1] < 5
    return to if inside and frozenset((cell, to)) not in WALLS else None


def blocked(cell):
    return {direction for direction in DIRECTIONS if neighbour(cell, direction) is None}


def parse(state):
    """`taxi, passenger (None: on board), destination` of a map, as cells; a hidden destination is under the taxi."""
    rows = state.splitlines()[1:6]
    found = {rows[r][2 * c + 1]: (r, c) for r in range(5) for c in range(5) if rows[r][2 * c + 1] in "TPDOX"}
    taxi = next(found[letter] for letter in "TOX" if letter in found)
    passenger = None if "X" in found else found.get("P", taxi)
    return taxi, passenger, found.get("D", taxi)


def distances(target):
    """Moves to `target` from every cell."""
    known, queue = {target: 0}, collections.deque([target])
    while queue:
        cell = queue.popleft()
        for to in filter(None, (neighbour(cell, direction) for direction in DIRECTIONS)):
            if to not in known:
                known[to] = known[cell] + 1
                queue.append(to)
    return known


def steps_needed(taxi, passenger, destination):
    """Length of the shortest trip; `passenger` None is on board."""
    if passenger is None:
        return distances(destination)[taxi] + 1
    return distances(passenger)[taxi] + 1 + distances(destination)[passenger] + 1


def optimal(state):
    """The texts of all optimal actions in a state of the full task."""
    taxi, passenger, destination = parse(state)
    goal = destination if passenger is None else passenger
    if taxi == goal:
        return {"drop off the passenger" if passenger is None else "pick up the passenger"}
    away = distances(goal)
    steps = {d: neighbour(taxi, d) for d in DIRECTIONS}
    return {f"move {d}" for d, to in steps.items() if to and away[to] < away[taxi]}
