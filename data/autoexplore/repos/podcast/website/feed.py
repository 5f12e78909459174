"""Build the feed of the website from finished episodes."""


def feed_item(title, seconds):
    return f"<item><title>{title}</title></item>"
