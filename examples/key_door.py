"""An environment of your own, whole: rooms in a row, one has a key, one a locked door.

    python rl.py --env examples.key_door:KeyDoor
    python reflect_rl.py --env examples.key_door:KeyDoor
"""

import itertools

from envs import Env

ROOMS = 7


class KeyDoor(Env):
    horizon = 20
    settings = {"trajectories": 100, "reflect_steps": 200, "policy_steps": 60, "updates": 30}

    def tasks(self, split):  # [room of the agent, of the key, of the door]: every fifth is held out
        starts = [list(start) for start in itertools.product(range(ROOMS), repeat=3)]
        part = {"train": (0, 1, 2), "valid": (3,), "test": (4,)}[split]
        return [start for i, start in enumerate(starts) if i % 5 in part]

    def reset(self, *, seed=None, options=None):
        self.room, self.key, self.door = options["task"]
        self.has_key, self.steps, self.last = False, 0, "none"
        return self.state(), self.info(False)

    def info(self, success):
        return {"actions": ("go left", "go right", "take the key", "open the door"), "success": success}

    def state(self):
        hand = "the key" if self.has_key else "nothing"
        return (f"There are {ROOMS} rooms. You are in room {self.room}. The key was in room {self.key}. "
                f"The door is in room {self.door}. In hand: {hand}. Last action: {self.last}.")

    def step(self, action):
        self.steps, self.last = self.steps + 1, self.info(False)["actions"][action]
        if action < 2:
            self.room = min(max(self.room + (-1, 1)[action], 0), ROOMS - 1)
        elif action == 2:
            self.has_key = self.has_key or self.room == self.key
        success = action == 3 and self.has_key and self.room == self.door
        return self.state(), 1.0 if success else -0.02, success, self.steps >= self.horizon, self.info(success)

    def goal(self):
        return self.door if self.has_key else self.key

    def expert_action(self):
        if self.room == self.goal():
            return 3 if self.has_key else 2
        return int(self.goal() > self.room)

    def reflection(self, mistake):  # what is so and what is wanted, not the action
        side = "left" if self.goal() < self.room else "right" if self.goal() > self.room else "here"
        wrong = f"To {self.last} was a mistake. " if mistake else ""
        return f"{wrong}In hand is {'the key' if self.has_key else 'nothing'}. Next goal: room {self.goal()}, {side}."
