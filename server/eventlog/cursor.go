package eventlog

import (
	"fmt"
	"hash/fnv"
	"strconv"
	"strings"

	"github.com/cloudcode-dev/cloudcode/server/fleet"
)

// cursor is a place in what happens in a session: behind the events with these
// numbers, and before all with higher ones.
type cursor struct {
	generation uint64 // for people, and for the day when sessions move
	ring       uint64 // of OpenCode's events; 0: behind none of them
	lifecycle  uint64 // of lifecycle events
}

// behind says whether something between c and o has not been passed by c.
func (c cursor) behind(o cursor) bool { return c.ring < o.ring || c.lifecycle < o.lifecycle }

// join returns the place behind everything that either is behind of.
func (c cursor) join(o cursor) cursor {
	return cursor{max(c.generation, o.generation), max(c.ring, o.ring), max(c.lifecycle, o.lifecycle)}
}

// id returns the cursor as an event id of the session with this tag.
func (c cursor) id(tag string) string {
	b := make([]byte, 0, 48)
	b = strconv.AppendUint(b, c.generation, 10)
	b = append(b, '-')
	b = strconv.AppendUint(b, c.ring, 10)
	b = append(b, '.')
	b = strconv.AppendUint(b, c.lifecycle, 10)
	b = append(b, '.')
	return string(append(b, tag...))
}

func parseID(id string) (cursor, string, error) {
	wrong := fmt.Errorf("%w: %q is not an event id: give back the id of an event as it came", fleet.ErrInvalidArgument, id[:min(len(id), 100)])
	generation, rest, ok1 := strings.Cut(id, "-")
	ring, rest, ok2 := strings.Cut(rest, ".")
	lifecycle, tag, ok3 := strings.Cut(rest, ".")
	if !ok1 || !ok2 || !ok3 || len(tag) != tagLen {
		return cursor{}, "", wrong
	}
	var c cursor
	for _, p := range []struct {
		text string
		to   *uint64
	}{{generation, &c.generation}, {ring, &c.ring}, {lifecycle, &c.lifecycle}} {
		n, err := strconv.ParseUint(p.text, 10, 64)
		if err != nil {
			return cursor{}, "", wrong
		}
		*p.to = n
	}
	if _, err := strconv.ParseUint(tag, 16, 32); err != nil {
		return cursor{}, "", wrong
	}
	return c, tag, nil
}

const tagLen = 8

// tagOf tells sessions apart that had the same id.
func tagOf(uid string) string {
	h := fnv.New32a()
	_, _ = h.Write([]byte(uid)) // never fails
	return fmt.Sprintf("%08x", h.Sum32())
}
