// Package ring keeps the newest events of one session, bounded by bytes, under
// sequence numbers that are never used twice.
package ring

import (
	"context"
	"sync"
	"time"
)

// Event is one event of a session's OpenCode.
type Event struct {
	Sequence   uint64
	Generation int64 // of the assignment under which it came
	Time       time.Time
	Type       string
	Directory  string
	Frame      []byte // verbatim JSON
}

// TypeGap marks that events before this one are missing although the numbers have
// no hole: nobody listened to OpenCode for a moment. Its frame is empty.
const TypeGap = "cloudcode.gap"

// overhead is about what an event costs besides its frame.
const overhead = 128

// Ring is safe for concurrent use.
type Ring struct {
	limit int

	mu      sync.Mutex
	events  []Event // oldest first; events[i].Sequence == first+i
	first   uint64  // sequence of events[0], or of the next event when empty
	bytes   int
	changed chan struct{} // closed and replaced at each append
}

// New returns a ring of at most limit bytes. Its numbers start at the present
// time in microseconds: a ring that is made anew, after the node daemon was
// restarted, starts far above where its predecessor ended.
func New(limit int, now time.Time) *Ring {
	return &Ring{limit: limit, first: uint64(now.UnixMicro()), changed: make(chan struct{})}
}

// Append gives an event the next number and keeps it; the oldest make room.
func (r *Ring) Append(e Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e.Sequence = r.first + uint64(len(r.events))
	r.events = append(r.events, e)
	r.bytes += len(e.Frame) + overhead
	drop := 0
	for r.bytes > r.limit && drop < len(r.events)-1 {
		r.bytes -= len(r.events[drop].Frame) + overhead
		drop++
	}
	if drop > 0 {
		// A new slice now and then, so that what was dropped is freed.
		if kept := r.events[drop:]; cap(kept) < 2*len(kept) {
			r.events = append(make([]Event, 0, 2*len(kept)), kept...)
		} else {
			clear(r.events[:drop])
			r.events = kept
		}
		r.first += uint64(drop)
	}
	close(r.changed)
	r.changed = make(chan struct{})
}

// Position says what the ring holds for a reader that has seen everything up to
// after; zero means that it has seen nothing and wants all that is held.
type Position struct {
	First uint64 // number of the first event that follows
	Last  uint64 // number of the newest event; First-1 if there is none
	Gap   bool   // events between after and First are lost, or after is not of this ring
}

// Position returns where a reader stands.
func (r *Ring) Position(after uint64) Position {
	r.mu.Lock()
	defer r.mu.Unlock()
	next := r.first + uint64(len(r.events))
	p := Position{First: r.first, Last: next - 1}
	switch {
	case after == 0:
	case after+1 < r.first || after >= next:
		p.Gap = true
	default:
		p.First = after + 1
	}
	return p
}

// Read returns the events from sequence number next on, at most max of them, and
// waits for one if there is none. lost says that events before the first one
// returned are no longer held. The error is ctx's.
func (r *Ring) Read(ctx context.Context, next uint64, most int) (events []Event, lost bool, err error) {
	for {
		r.mu.Lock()
		if next < r.first {
			next, lost = r.first, true
		}
		if i := next - r.first; i < uint64(len(r.events)) {
			events = append(events, r.events[i:min(uint64(len(r.events)), i+uint64(most))]...)
			r.mu.Unlock()
			return events, lost, nil
		}
		changed := r.changed
		r.mu.Unlock()
		if lost {
			return nil, true, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, false, ctx.Err()
		}
	}
}
