"""What a user can mend: the error that marks a slide as failed, and that of settings, which stops the job."""


class SettingsError(ValueError):
    """Settings, weights or a machine that do not fit: no slide would do better. Shown without a traceback."""


class SlideError(Exception):
    """A known problem of one slide; the message names the slide, its file, the value and the remedy.

    `tile` and `encode` record it and let the cohort go on. Any other exception (a bug, a full disk, a wrong
    setting) is no property of a slide and stops the job.
    """
