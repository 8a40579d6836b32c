"""Running the course: notebooks, profiles, pages, problem sets and the report on this machine."""
