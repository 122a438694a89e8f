"""Files of a corpus, and the names that its documents have."""


def write(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def names(documents):
    return [document.name for document in documents]
