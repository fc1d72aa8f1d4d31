"""Files of data sets on the Hugging Face hub: one file, fetched once, kept in the hub's cache."""

from pathlib import Path

from loki_attn.errors import ModelError
from loki_attn.models.noise import first_line


def fetch_dataset_file(repo_id: str, filename: str) -> Path:
    """Return a local copy of one file of a data set on the hub, downloading it where needed.

    Args:
        repo_id: The data set, as ``org/name``.
        filename: Path of the file in its repository.

    Returns:
        The file in the hub's local cache.

    Raises:
        ModelError: huggingface_hub is not installed, or the file is neither cached nor to be had.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ModelError(
            f"Fetching {filename!r} of data set {repo_id!r} needs huggingface_hub "
            f"({first_line(error)}); run: pip install 'loki-attn[transformers]', or give a local "
            "file"
        ) from error
    try:
        return Path(hf_hub_download(repo_id, filename, repo_type="dataset"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"Cannot fetch {filename!r} of data set {repo_id!r} from the hub: {first_line(error)}; "
            "check the name and the network, or download the file and give its path"
        ) from error
