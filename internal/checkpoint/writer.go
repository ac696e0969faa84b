package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// WriterOptions say what is saved and by whom.
type WriterOptions struct {
	Dir    string // the tree
	IDBase uint32 // host id of the container's root
	Owner  Owner
	// StateDir is for a cache, a list of uploads, and staging. It is outside Dir, on
	// the same disk, and this writer's own. What is in it only saves time.
	StateDir string
	// Exclude says what not to save, by path relative to Dir. It must always give
	// the same answer. An excluded folder is not entered.
	Exclude func(rel string, isDir bool) bool
	Log     *slog.Logger
	// Grace is that of garbage collection, DefaultGrace if zero: uploads that no
	// checkpoint names are relied on for half of it.
	Grace time.Duration

	deltaMax int64 // less in tests
}

// Stats of the last Save.
type Stats struct {
	Frozen  time.Duration // from the freeze's call to the thaw's return; 0 without
	Total   time.Duration
	Freezes int
	Read    int64 // bytes of files read
	Sent    int64 // bytes of packs uploaded
}

// Writer makes the checkpoints of one session, one at a time.
type Writer struct {
	s   *Session
	o   WriterOptions
	ids ids
	log *slog.Logger

	mu    sync.Mutex
	head  Head
	base  *Manifest // of the head; nil before the first
	tree  *dir
	index map[chunkID]*chunk
	packs []*pack         // all that index refers to
	dirty bool            // the picture has changed since base
	live  map[*pack]int64 // bytes that base needs of each pack
	stats Stats           // of the Save under way
	last  atomic.Pointer[Stats]
	read  atomic.Int64
	cache cacheState
}

// NewWriter prepares to save. opts.Owner must have acquired the session. Returns
// ErrFenced if it has not, or no more.
func (s *Session) NewWriter(ctx context.Context, opts WriterOptions) (*Writer, error) {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if opts.deltaMax == 0 {
		opts.deltaMax = deltaMax
	}
	if opts.Grace == 0 {
		opts.Grace = DefaultGrace
	}
	w := &Writer{s: s, o: opts, ids: ids{opts.IDBase}, log: opts.Log, tree: &dir{}, index: map[chunkID]*chunk{}, dirty: true}
	if opts.StateDir != "" {
		if err := os.MkdirAll(opts.StateDir, 0o700); err != nil {
			return nil, err
		}
	}
	h, err := s.Head(ctx)
	if errors.Is(err, ErrNotFound) && s.err == nil {
		return nil, fmt.Errorf("%w: %q has no head: acquire it first", ErrFenced, s.prefix)
	}
	if err != nil {
		return nil, err
	}
	if err := s.owns(h, opts.Owner); err != nil {
		return nil, err
	}
	w.head = h
	if h.Manifest != "" {
		if err := w.loadBase(ctx); err != nil {
			return nil, err
		}
	}
	w.loadJournal()
	if w.loadCache() {
		return w, nil
	}
	// Without the cache, or with an older one, the base's own entries say what is
	// in the store.
	if w.base != nil {
		if err := w.loadEntries(ctx); err != nil {
			return nil, err
		}
	}
	return w, nil
}

func (w *Writer) loadBase(ctx context.Context) error {
	m, err := w.s.Manifest(ctx, w.head.Manifest)
	if errors.Is(err, ErrDamaged) || errors.Is(err, ErrNotFound) {
		// The next checkpoint is a whole one. The damage is not its concern.
		w.log.Error("the last checkpoint is damaged: all files will be sent again", "checkpoint", w.head.Manifest, "error", err)
		return nil
	}
	if err != nil {
		return err
	}
	w.base = m
	m.cat.chunks = w.index
	for _, p := range m.packs {
		p.committed = true
		w.packs = append(w.packs, p)
	}
	for _, c := range m.segments {
		w.index[c.id] = c
	}
	return nil
}

func (w *Writer) loadEntries(ctx context.Context) error {
	_, err := w.s.entries(ctx, w.base, true) // fills the index, which is the catalog's
	if errors.Is(err, ErrDamaged) || errors.Is(err, ErrNotFound) {
		w.log.Error("the last checkpoint is damaged: all files will be sent again", "checkpoint", w.base.ID, "error", err)
		for _, p := range w.base.packs {
			p.lost = true
		}
		return nil
	}
	return err
}

// Changed says whether the tree differs from the last checkpoint, by a walk that
// reads no file. It may say so of a file that was only touched.
func (w *Writer) Changed(ctx context.Context) (bool, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.dirty || w.base == nil {
		return true, nil
	}
	return w.differs(ctx)
}

// Stats of the last Save that ended. It does not wait for one that is under way.
func (w *Writer) Stats() Stats {
	if s := w.last.Load(); s != nil {
		return *s
	}
	return Stats{}
}

// Close keeps what saves time for the next writer.
func (w *Writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	err := w.saveCache()
	if w.cache.journal != nil {
		err = errors.Join(err, w.cache.journal.Close())
		w.cache.journal = nil
	}
	return err
}

// sweep forgets the content of files that is not to be relied on any more: it is
// read and sent again.
func (w *Writer) sweep() {
	old := time.Now().Add(-w.o.Grace / 2)
	lost := false
	for _, p := range w.packs {
		if !p.committed && p.uploaded.Before(old) {
			p.lost = true
		}
		lost = lost || p.lost
	}
	if !lost {
		return
	}
	w.forget()
	keep := w.packs[:0]
	for _, p := range w.packs {
		if !p.lost {
			keep = append(keep, p)
		}
	}
	clear(w.packs[len(keep):])
	w.packs = keep
}

func (w *Writer) forget() {
	for id, c := range w.index {
		if !c.usable() {
			delete(w.index, id)
		}
	}
	w.tree.each(func(n *node) {
		c := n.content
		if c == nil {
			return
		}
		if !c.usable() {
			n.content = nil
			return
		}
		for _, x := range c.lists {
			if !x.c.usable() {
				c.lists = nil
				return
			}
		}
	})
}
