"""Numbers about answers: scores, and how sure one may be of them. No torch."""
