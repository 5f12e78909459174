"""Filter the navigation state with noisy ranges."""


def update_state(state, gain, residual):
    return state + gain * residual
