from data_prep.documents import normalise


class Cleaner:
    def __init__(self, prep):
        pass

    def __call__(self, language, text):
        t = normalise(text)
        return (t, None) if t else (None, "empty")
