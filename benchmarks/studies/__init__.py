"""Two questions that a benchmark does not answer: what real policies route, and how routing trains."""
