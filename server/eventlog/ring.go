package eventlog

import (
	"sync"
	"time"

	cloudcodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/v1"
	"github.com/cloudcode-dev/cloudcode/server/fleet"
)

// kind of an entry.
type kind int

const (
	kindRing      kind = iota // of OpenCode, or the node's word that some are missing
	kindLifecycle             // of the store
	kindEnd
)

// entry is one event in a feed. It is never changed.
type entry struct {
	kind   kind
	event  *cloudcodev1.SessionEvent // its id is `at`
	before cursor                    // all that comes before it
	at     cursor                    // and it
	time   time.Time
	old    bool // the node held it before the feed first reached the node
	size   int

	revision uint64 // of the session in a lifecycle event
}

// ring holds the newest events of a session, for all subscribers.
type ring struct {
	tag   string
	limit int

	mu      sync.Mutex
	entries []*entry
	first   uint64 // position of entries[0]
	bytes   int
	at      cursor // behind everything that ever was in here
	// start is the number before the first event that the node held when it was
	// first reached: who has seen no event of OpenCode misses none by that.
	start   uint64
	newest  uint64         // number of the newest event that the node said it has; it may be on its way
	reached bool           // the node was reached
	blind   bool           // it was not when a subscriber first asked
	epoch   int            // counts how often the node's numbers began anew, lower
	session *fleet.Session // the newest known
	err     error          // there will be nothing more
	changed chan struct{}  // closed and replaced when any of this changes
}

func newRing(tag string, limit int) *ring {
	return &ring{tag: tag, limit: limit, changed: make(chan struct{})}
}

// view is what a reader sees of a ring.
type view struct {
	entries []*entry
	next    uint64 // position behind them
	at      cursor
	start   uint64
	newest  uint64
	reached bool
	blind   bool
	epoch   int
	session *fleet.Session
	err     error
	changed <-chan struct{}
}

// read copies entries from a position on into buf, up to its capacity. They are
// copied so that a reader that waits holds on to those few only.
func (r *ring) read(position uint64, buf []*entry) view {
	r.mu.Lock()
	defer r.mu.Unlock()
	position = max(position, r.first)
	held := r.entries[min(position-r.first, uint64(len(r.entries))):]
	buf = append(buf[:0], held[:min(len(held), cap(buf))]...)
	v := r.view()
	v.entries, v.next = buf, position+uint64(len(buf))
	return v
}

// head is a view from behind the newest entry; an end is still to come.
func (r *ring) head() view {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := len(r.entries)
	if n > 0 && r.entries[n-1].kind == kindEnd {
		n--
	}
	v := r.view()
	v.next = r.first + uint64(n)
	return v
}

func (r *ring) view() view {
	return view{
		at: r.at, start: r.start, newest: max(r.newest, r.at.ring), reached: r.reached, blind: r.blind, epoch: r.epoch,
		session: r.session, err: r.err, changed: r.changed,
	}
}

// update changes the ring and wakes all readers once.
func (r *ring) update(fn func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fn()
	close(r.changed)
	r.changed = make(chan struct{})
}

// push adds an event that moves the ring from r.at to `at`. The oldest make
// room. r.mu is held.
func (r *ring) push(e *entry, at cursor) {
	e.before, e.at = r.at, at
	e.event.Id = at.id(r.tag)
	r.at = at
	r.entries = append(r.entries, e)
	r.bytes += e.size
	drop := 0
	for r.bytes > r.limit && drop < len(r.entries)-1 {
		r.bytes -= r.entries[drop].size
		r.entries[drop] = nil
		drop++
	}
	r.entries = r.entries[drop:]
	r.first += uint64(drop)
}

// clear drops all that is held. r.mu is held.
func (r *ring) clear() {
	r.first += uint64(len(r.entries))
	r.entries, r.bytes = nil, 0
}
