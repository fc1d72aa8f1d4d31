"""Profiles of models: the file that is named, or those that `loki-attn profile` keeps."""

from pathlib import Path

from loki_attn.models.sources import basis_path
from loki_attn.policy import Policy
from loki_attn.profile import Profile


def profile_path(model: str, method: str) -> Path:
    """The cache's file for what a method was given for a model, by the user's name of the model.

    Another model of the same name finds the same file, and the profile in it refuses that model.
    """
    named = basis_path(model, method)
    return named.parent.with_name("profiles") / named.name


def find_profile(policy: Policy, model: str, given: str | Path | None = None) -> Profile | None:
    """Load the profile that a policy may need.

    Args:
        policy: The policy.
        model: The model, by the name or the folder that it is loaded from.
        given: A file; None for what is cached of the policy's methods, merged.

    Returns:
        The profile; None where none is there. A method that cannot do without says so itself when
        it is bound.

    Raises:
        ProfileError: If a file cannot be read.
    """
    if given is not None:
        return Profile.load(given)
    found: Profile | None = None
    for part in (policy.select, policy.evict, policy.allocate):
        path = profile_path(model, part.method)
        if getattr(part, "needs_profile", False) and model and path.is_file():
            loaded = Profile.load(path)
            found = loaded if found is None else found.merged(loaded)
    return found
