"""Operations (google.longrunning): learning a direction, run by one server of a store at a time under a lease."""
