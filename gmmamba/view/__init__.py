"""The viewer: a page served on this machine on which the slides of a finished dataset can be looked at, with overlays."""


class ViewError(RuntimeError):
    """The viewer cannot be served as asked."""
