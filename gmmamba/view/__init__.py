"""The viewer: a page, served on this machine, of the slides of a finished dataset and what lies over them."""


class ViewError(RuntimeError):
    """The viewer cannot be served as asked."""
