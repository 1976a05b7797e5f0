"""One file a page: each builds its elements from what the API says and stores nothing of its own."""
