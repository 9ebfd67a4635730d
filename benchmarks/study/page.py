def summaries(rows):
    return []


def write_page(*a):
    pass
