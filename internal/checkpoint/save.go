package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
)

const (
	// deltaMax is how much may be left to take in the frozen walk before it is
	// called off and another walk goes first; freezesMax bounds how often.
	deltaMax = 64 << 20
	// What is taken beyond deltaMax then goes to a file, not into memory.
	freezesMax = 3
	// wholeMax is the size up to which a file is taken as it is; larger ones are
	// cut and compared at once, because most of them has not changed.
	wholeMax = 1 << 20
)

// Save makes a checkpoint of the tree as it is at one instant.
//
// With freeze it first saves what changed while the session runs on, then calls
// freeze, takes what changed since, and calls thaw, also after an error, before it
// uploads that. Without freeze the tree must be quiet by itself; files that change
// are noted.
//
// If nothing changed since the last checkpoint it returns that one, with Unchanged
// set. Returns ErrFenced if a newer owner has the session. After any other error the
// next Save goes on where this one stopped.
func (w *Writer) Save(ctx context.Context, freeze func(context.Context) (thaw func() error, err error), meta Meta) (Info, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	start := time.Now()
	w.stats = Stats{}
	w.read.Store(0)
	w.sweep()
	w.compact()

	p := w.s.r.newPacker(ctx, w.index, w.arrived)
	info, err := w.save(ctx, p, freeze, meta)
	if p.close() {
		w.forget()
	}
	w.stats.Total, w.stats.Read, w.stats.Sent = time.Since(start), w.read.Load(), p.sent
	last := w.stats
	w.last.Store(&last)
	if err != nil {
		// What was read and sent so far need not be again.
		return Info{}, errors.Join(err, w.saveCache())
	}
	return info, w.keepCache()
}

func (w *Writer) save(ctx context.Context, p *packer, freeze func(context.Context) (func() error, error), meta Meta) (Info, error) {
	last := &scan{take: w.store(p), once: freeze == nil}
	if freeze == nil {
		if err := w.scan(ctx, last); err != nil {
			return Info{}, w.first(p, err)
		}
	} else {
		var err error
		if last, err = w.frozen(ctx, p, freeze); err != nil {
			return Info{}, w.first(p, err)
		}
	}
	if !w.dirty && w.base != nil && !w.differsIn(meta) {
		return w.unchanged(), nil
	}
	m, err := w.encode(p, last)
	if err != nil {
		return Info{}, w.first(p, err)
	}
	if w.same(m) {
		w.dirty = false
		if !w.differsIn(meta) {
			return w.unchanged(), nil
		}
	}
	if err := p.finish(); err != nil {
		return Info{}, err
	}
	return w.commit(ctx, p, m, meta)
}

// first gives the packer's error if it has one: others follow from it.
func (w *Writer) first(p *packer, err error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err != nil {
		return p.err
	}
	return err
}

func (w *Writer) unchanged() Info {
	info := w.base.Info
	info.Unchanged = true
	return info
}

// differsIn says whether a checkpoint of the same tree is wanted for its own sake.
func (w *Writer) differsIn(m Meta) bool {
	b := w.base.Meta
	return m.OpenCodeVersion != b.OpenCodeVersion || m.Mode != b.Mode || m.Restored != b.Restored ||
		!slices.Equal(m.SessionJSON, b.SessionJSON) || m.Trigger != b.Trigger && keptTrigger(m.Trigger)
}

func (w *Writer) same(m *Manifest) bool {
	return w.base != nil && slices.EqualFunc(m.segments, w.base.segments, func(a, b *chunk) bool { return a.id == b.id })
}

// frozen makes the walks around a freeze. The picture is that of the frozen
// instant when it returns.
func (w *Writer) frozen(ctx context.Context, p *packer, freeze func(context.Context) (func() error, error)) (*scan, error) {
	for {
		pre := &scan{take: w.store(p)}
		if err := w.scan(ctx, pre); err != nil {
			return nil, err
		}
		w.stats.Freezes++
		d := &delta{w: w, p: p, spill: spill{dir: w.o.StateDir}, last: w.stats.Freezes == freezesMax}
		s, err := w.freeze(ctx, d, freeze)
		if err == nil {
			err = d.store()
		}
		d.spill.close()
		if !errors.Is(err, errLarge) {
			return s, err
		}
		w.log.Info("much changed meanwhile: saving it before the session is frozen again", "freezes", w.stats.Freezes)
	}
}

// freeze walks the tree while the session stands still.
func (w *Writer) freeze(ctx context.Context, d *delta, freeze func(context.Context) (func() error, error)) (s *scan, err error) {
	start := time.Now()
	thaw, err := freeze(ctx)
	if err != nil {
		return nil, fmt.Errorf("freeze: %w", err)
	}
	thawed := sync.OnceValue(func() error {
		err := thaw()
		w.stats.Frozen += time.Since(start)
		return err
	})
	defer thawed() // if the walk panics
	s = &scan{take: d.take}
	err = w.scan(ctx, s)
	if thawErr := thawed(); thawErr != nil {
		err = errors.Join(err, fmt.Errorf("thaw: %w", thawErr))
	}
	return s, err
}

// commit writes the manifest and moves the head. All packs are in the store.
func (w *Writer) commit(ctx context.Context, p *packer, m *Manifest, meta Meta) (Info, error) {
	old := time.Now().Add(-w.o.Grace / 2)
	for _, k := range m.packs {
		if !k.committed && k.uploaded.Before(old) {
			return Info{}, fmt.Errorf("%w: this checkpoint took too long; the next one goes on", objstore.ErrUnavailable)
		}
	}
	m.Meta, m.Owner, m.session = meta, w.o.Owner, w.s.escaped
	m.Generation, m.Node, m.Parent, m.UploadedBytes = w.o.Owner.Generation, w.o.Owner.Node, w.head.Manifest, p.sent
	m.ID, m.Time = newManifestID(time.Now(), w.head.Manifest)
	text, err := w.s.r.crypt.encodeManifest(m)
	if err != nil {
		return Info{}, err
	}
	key := w.s.key(m.ID)
	if _, err := w.s.r.store.Put(ctx, key, text, objstore.PutOptions{ContentType: "application/octet-stream"}); err != nil {
		return Info{}, fmt.Errorf("write %s: %w", key, err)
	}
	h, err := w.s.move(ctx, w.head, w.o.Owner, m.ID, meta.Restored)
	if errors.Is(err, ErrFenced) {
		// It will never be the head's.
		return Info{}, errors.Join(err, w.s.r.store.Delete(context.WithoutCancel(ctx), key))
	}
	if err != nil {
		return Info{}, err
	}
	w.head = h
	w.adopt(m)
	return m.Info, nil
}

// adopt makes m the base. Packs that only the old base held may be collected now.
func (w *Writer) adopt(m *Manifest) {
	needed := map[*pack]bool{}
	for _, k := range m.packs {
		k.committed = true
		needed[k] = true
	}
	dropped := false
	for _, k := range w.packs {
		if k.committed && !needed[k] {
			k.lost, dropped = true, true
		}
	}
	w.base, w.dirty = m, false
	if dropped {
		w.sweep()
	}
	w.keepJournal()
}
