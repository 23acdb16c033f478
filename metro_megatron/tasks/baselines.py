"""What counting words gives, on the same rows."""

import numpy as np
from numpy.typing import NDArray

from metro_megatron.errors import UserError
from metro_megatron.probing.folder import ProbeTask
from metro_megatron.probing.kinds import Features

MOST_FEATURES = 5000


def tfidf(task: ProbeTask) -> float:
    """The task's metric by TF-IDF of words and word pairs, of single words by their letters; logistic regression.

    Raises UserError without scikit-learn.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise UserError('scikit-learn is not installed; install the extra: pip install -e ".[finetune]"') from None

    kind = task.kind
    sides = [kind.texts(task.train) if kind.learns else [], kind.texts(task.test)]
    pieces = [[piece for text in side for piece in text] for side in sides]
    analysis = {"analyzer": "char_wb", "ngram_range": (2, 4)} if kind.name == "spans" else {"ngram_range": (1, 2)}
    vectorizer = TfidfVectorizer(sublinear_tf=True, max_features=MOST_FEATURES, dtype=np.float32, **analysis)
    vectorizer.fit(pieces[0] or pieces[1])
    of_train, of_test = (vectorizer.transform(side).toarray() if side else np.zeros((0, 1)) for side in pieces)
    return kind.scores(task.train, of_train, task.test, of_test, _logistic).figures[kind.metric]


def _logistic(train: Features, classes: NDArray[np.int64], test: Features, num_classes: int) -> NDArray[np.float64]:
    """Probabilities [m, C] by the regression that the demonstration's figure has, too."""
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=4.0, max_iter=1000).fit(csr_matrix(train), classes)
    return np.asarray(model.predict_proba(csr_matrix(test)))
