"""An environment of your own, whole: rooms in a row, one has a key, one a locked door.

    python rl.py --env examples.key_door:KeyDoor
    python reflect_rl.py --env examples.key_door:KeyDoor
"""

import itertools

from envs import Env

ROOMS, ACTIONS = 7, ("go left", "go right", "take the key", "open the door")


class KeyDoor(Env):
    horizon = 20
    settings = {"trajectories": 200, "reflect_steps": 300, "policy_steps": 40, "updates": 30}

    def tasks(self, split):  # [room of the agent, of the key, of the door]: every fifth is held out
        starts = [list(start) for start in itertools.product(range(ROOMS), repeat=3)]
        part = {"train": (0, 1, 2), "valid": (3,), "test": (4,)}[split]
        return [start for i, start in enumerate(starts) if i % 5 in part]

    def reset(self, *, seed=None, options=None):
        self.room, self.key, self.door = options["task"]
        self.has_key, self.steps, self.last = False, 0, "none"
        return self.state(), self.info(False)

    def info(self, success):
        return {"actions": ACTIONS, "success": success}

    def state(self):  # a picture: K the key, D the door, Y you
        cells = [""] * ROOMS
        for letter, room in (("K", self.key), ("D", self.door), ("Y", self.room)):
            if letter != "K" or not self.has_key:
                cells[room] += letter
        hand = "the key" if self.has_key else "nothing"
        return f"Rooms: {' '.join(cell or '.' for cell in cells)}\nIn hand: {hand}.\nLast action: {self.last}."

    def step(self, action):
        before, self.steps = (self.room, self.has_key), self.steps + 1
        if action < 2:
            self.room = min(max(self.room + (-1, 1)[action], 0), ROOMS - 1)
        elif action == 2:
            self.has_key = self.has_key or self.room == self.key
        success = action == 3 and self.has_key and self.room == self.door
        self.last = ACTIONS[action] + (", in vain" if (self.room, self.has_key) == before and not success else "")
        return self.state(), 1.0 if success else -0.02, success, self.steps >= self.horizon, self.info(success)

    def goal(self):
        return self.door if self.has_key else self.key

    def expert_action(self):
        if self.room == self.goal():
            return 3 if self.has_key else 2
        return int(self.goal() > self.room)

    def reflection(self, mistake):  # what is so and what is wanted, not the action
        goal = "the door" if self.has_key else "the key"
        side = "to the left" if self.goal() < self.room else "to the right" if self.goal() > self.room else "here"
        return ("The last action was a mistake. " if mistake else "") + f"Next goal: {goal}, {side}."
