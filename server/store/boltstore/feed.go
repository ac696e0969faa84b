package boltstore

import (
	"context"
	"fmt"
	"iter"
	"sync"

	"github.com/cloudcode-dev/cloudcode/server/fleet"
	"github.com/cloudcode-dev/cloudcode/server/store"
)

// What a watcher that falls behind can catch up with, before it has to read
// everything again.
const (
	historyChanges = 8192
	historyBytes   = 32 << 20
)

// sized is a change and about how large it is.
type sized struct {
	store.Change
	size int
}

// feed holds the newest changes. Watchers have no queue of their own: each has
// a position in the history, so a slow one costs nothing.
type feed struct {
	mu      sync.Mutex
	newest  store.Revision
	history []sized
	dropped store.Revision // all changes up to here are not, or no longer, held
	bytes   int
	changed chan struct{} // closed at the next change
	closed  bool
}

func newFeed(r store.Revision) *feed {
	return &feed{newest: r, dropped: r, changed: make(chan struct{})}
}

func (f *feed) revision() store.Revision {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.newest
}

func (f *feed) publish(newest store.Revision, changes []sized) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.newest = newest
	for _, c := range changes {
		f.history = append(f.history, c)
		f.bytes += c.size
	}
	// Only now and then, and then a quarter: what is kept is copied.
	drop := 0
	if len(f.history) > historyChanges+historyChanges/4 || f.bytes > historyBytes+historyBytes/4 {
		drop = f.tooMany()
	}
	if drop > 0 {
		// A watcher may be reading the old slice: leave it as it is.
		f.history = append(make([]sized, 0, historyChanges+historyChanges/4), f.history[drop:]...)
	}
	close(f.changed)
	f.changed = make(chan struct{})
}

// tooMany takes the oldest changes out of the sums and says how many they are.
func (f *feed) tooMany() (drop int) {
	for drop < len(f.history) && (len(f.history)-drop > historyChanges || f.bytes > historyBytes) {
		// Never half a transaction.
		f.dropped = f.history[drop].Revision
		for drop < len(f.history) && f.history[drop].Revision == f.dropped {
			f.bytes -= f.history[drop].size
			drop++
		}
	}
	return drop
}

func (f *feed) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	close(f.changed)
}

// after returns the changes behind a revision; if there are none, a channel
// that closes when that may be different.
func (f *feed) after(r store.Revision) ([]sized, <-chan struct{}, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil, nil, fmt.Errorf("%w: the server is stopping", fleet.ErrUnavailable)
	}
	if r < f.dropped || r > f.newest {
		return nil, nil, fmt.Errorf("%w: the changes behind revision %d are not held", fleet.ErrStale, r)
	}
	lo, hi := 0, len(f.history)
	for lo < hi {
		if mid := (lo + hi) / 2; f.history[mid].Revision <= r {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return f.history[lo:len(f.history):len(f.history)], f.changed, nil
}

// Watch implements store.Store.
func (s *Store) Watch(ctx context.Context, after store.Revision) iter.Seq2[store.Change, error] {
	return func(yield func(store.Change, error) bool) {
		for ctx.Err() == nil {
			changes, changed, err := s.feed.after(after)
			if err != nil {
				yield(store.Change{}, err)
				return
			}
			for _, c := range changes {
				if ctx.Err() != nil || !yield(c.Change, nil) {
					return
				}
				after = c.Revision
			}
			if len(changes) > 0 {
				continue
			}
			select {
			case <-changed:
			case <-ctx.Done():
			}
		}
	}
}
