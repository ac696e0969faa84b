package checkpoint

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
)

const (
	// fetchSize is the most one request asks for, fetchGap what is read and
	// thrown away rather than asked around.
	fetchSize    = 4 << 20
	fetchGap     = 128 << 10
	fetchWorkers = 8
)

// job is a range of one pack, with the blocks wanted of it.
type job struct {
	pack     *pack
	off, end int64
	blocks   []*block
}

// jobs groups blocks into few requests. With order they begin in the order of
// first use, else by pack.
func jobs(blocks []*block) []job {
	byPack := map[*pack][]*block{}
	var packs []*pack
	for _, b := range blocks {
		if byPack[b.pack] == nil {
			packs = append(packs, b.pack)
		}
		byPack[b.pack] = append(byPack[b.pack], b)
	}
	var out []job
	for _, p := range packs {
		bs := byPack[p]
		slices.SortFunc(bs, func(a, b *block) int { return cmp.Compare(a.off, b.off) })
		j := job{pack: p, off: -1}
		for _, b := range bs {
			end := b.off + int64(b.stored)
			if j.off >= 0 && (b.off-j.end > fetchGap || end-j.off > fetchSize) {
				out = append(out, j)
				j = job{pack: p, off: -1}
			}
			if j.off < 0 {
				j.off = b.off
			}
			j.end = max(j.end, end)
			j.blocks = append(j.blocks, b)
		}
		if j.off >= 0 {
			out = append(out, j)
		}
	}
	return out
}

// fetch reads blocks and calls use for each, from several goroutines.
func (r *Repository) fetch(ctx context.Context, blocks []*block, use func(b *block, plain []byte) error) error {
	g, each := errgroup.WithContext(ctx)
	g.SetLimit(fetchWorkers)
	for _, j := range jobs(blocks) {
		if each.Err() != nil {
			break
		}
		g.Go(func() error { return r.fetchJob(each, j, use) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return ctx.Err()
}

func (r *Repository) fetchJob(ctx context.Context, j job, use func(b *block, plain []byte) error) error {
	text, err := r.store.GetRange(ctx, r.pack(j.pack.id), j.off, j.end-j.off)
	if err != nil {
		return r.packError(ctx, j.pack, err)
	}
	if int64(len(text)) != j.end-j.off {
		return fmt.Errorf("%s: %w: it ends early", r.pack(j.pack.id), ErrDamaged)
	}
	for _, b := range j.blocks {
		if err := ctx.Err(); err != nil {
			return err
		}
		plain, err := r.openBlock(b, text[b.off-j.off:][:b.stored])
		if err != nil {
			return err
		}
		if err := use(b, plain); err != nil {
			return err
		}
	}
	return nil
}

func (r *Repository) openBlock(b *block, sealed []byte) ([]byte, error) {
	plain, err := r.crypt.open("block", nil, sealed, int(b.plain))
	if err != nil {
		return nil, fmt.Errorf("%s: block at %d: %w", r.pack(b.pack.id), b.off, err)
	}
	return plain, nil
}

// packError tells damage from trouble: a pack that is missing or too short is damage.
func (r *Repository) packError(ctx context.Context, p *pack, err error) error {
	key := r.pack(p.id)
	if errors.Is(err, objstore.ErrNotFound) {
		return fmt.Errorf("%s: %w: it is missing", key, ErrDamaged)
	}
	if !errors.Is(err, objstore.ErrUnavailable) && !errors.Is(err, objstore.ErrDenied) && ctx.Err() == nil {
		if o, statErr := r.store.Stat(ctx, key); statErr == nil && o.Size < p.size+int64(packHeader+packFooter) {
			return fmt.Errorf("%s: %w: it has %d bytes only", key, ErrDamaged, o.Size)
		}
	}
	return fmt.Errorf("read %s: %w", key, err)
}

// content cuts a chunk out of its block and checks it.
func (r *Repository) content(c *chunk, plain []byte) ([]byte, error) {
	if uint64(c.off)+uint64(c.n) > uint64(len(plain)) {
		return nil, fmt.Errorf("%s: %w: block at %d is too short", r.pack(c.blk.pack.id), ErrDamaged, c.blk.off)
	}
	text := plain[c.off:][:c.n]
	if r.crypt.id(text) != c.id {
		return nil, fmt.Errorf("%s: %w: wrong checksum in the block at %d", r.pack(c.blk.pack.id), ErrDamaged, c.blk.off)
	}
	return text, nil
}

// chunks reads chunks that are few and small: segments and lists.
func (r *Repository) chunks(ctx context.Context, want []*chunk) ([][]byte, error) {
	out := make([][]byte, len(want))
	first := map[chunk]int{} // a file of one text over and over has one list over and over
	at := map[*block][]int{}
	var blocks []*block
	total := int64(0)
	for i, c := range want {
		if _, again := first[*c]; again {
			continue
		}
		first[*c] = i
		if total += int64(c.n); total > maxTree {
			return nil, fmt.Errorf("%w: its tree is larger than a tree can be", ErrDamaged)
		}
		if at[c.blk] == nil {
			blocks = append(blocks, c.blk)
		}
		at[c.blk] = append(at[c.blk], i)
	}
	err := r.fetch(ctx, blocks, func(b *block, plain []byte) error {
		used := 0
		for _, i := range at[b] {
			used += int(want[i].n)
		}
		for _, i := range at[b] { // a block is used once: no two write one item
			text, err := r.content(want[i], plain)
			if err != nil {
				return err
			}
			if used < len(plain)/2 {
				text = bytes.Clone(text) // the rest need not stay
			}
			out[i] = text
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for i, c := range want {
		out[i] = out[first[*c]]
	}
	return out, nil
}

// entries reads all of a checkpoint's tree. Lists are put in place if flat is set.
func (s *Session) entries(ctx context.Context, m *Manifest, flat bool) ([]entry, error) {
	texts, err := s.r.chunks(ctx, m.segments)
	if err != nil {
		return nil, s.gone(ctx, m.ID, err)
	}
	damaged := func(err error) error { return fmt.Errorf("%s: %w: %w", s.key(m.ID), ErrDamaged, err) }
	var all []entry
	var size treeSize
	for i, text := range texts {
		from := len(all)
		if all, err = decodeSegment(m.cat, text, segmentMax, all); err == nil {
			err = size.add(all[from:])
		}
		if err == nil && size.entries > m.Files {
			err = fmt.Errorf("more entries than the %d that it should have", m.Files)
		}
		if err != nil {
			return nil, damaged(fmt.Errorf("segment %d: %w", i, err))
		}
		texts[i] = nil
	}
	if size.entries != m.Files {
		return nil, damaged(fmt.Errorf("%d entries, not %d", size.entries, m.Files))
	}
	if err := checkTree(all); err != nil {
		return nil, damaged(err)
	}
	if !flat {
		return all, nil
	}
	return all, s.gone(ctx, m.ID, s.flatten(ctx, m, all, &size))
}

// treeSize adds up what a tree has of what is bounded.
type treeSize struct{ entries, extents, paths int64 }

func (s *treeSize) add(entries []entry) error {
	for i := range entries {
		s.entries++
		s.extents += int64(len(entries[i].ext))
		s.paths += int64(len(entries[i].path))
	}
	return s.check()
}

func (s *treeSize) check() error {
	switch {
	case s.entries > maxEntries:
		return fmt.Errorf("the tree has more than %d files", maxEntries)
	case s.extents > maxExtents:
		return fmt.Errorf("the tree's files have more than %d parts", maxExtents)
	case s.paths > maxPaths:
		return fmt.Errorf("the tree's paths have more than %d bytes together", int64(maxPaths))
	}
	return nil
}

// flatten replaces lists of extents by what is in them.
func (s *Session) flatten(ctx context.Context, m *Manifest, all []entry, total *treeSize) error {
	var want []*chunk
	for i := range all {
		if all[i].lists {
			for _, x := range all[i].ext {
				want = append(want, x.c)
			}
		}
	}
	if len(want) == 0 {
		return nil
	}
	texts, err := s.r.chunks(ctx, want)
	if err != nil {
		return err
	}
	for i := range all {
		e := &all[i]
		if !e.lists {
			continue
		}
		var flat []extent
		size := int64(0)
		for range e.ext {
			n := len(flat)
			if flat, err = decodeList(m.cat, texts[0], flat); err == nil {
				total.extents += int64(len(flat) - n)
				err = total.check()
			}
			for _, x := range flat[n:] {
				if size += x.size(); err == nil && (size < 0 || size > e.size) {
					err = errors.New("they are more than its size")
				}
			}
			if err != nil {
				return fmt.Errorf("%s: %w: parts of %q: %w", s.key(m.ID), ErrDamaged, e.path, err)
			}
			texts = texts[1:]
		}
		if size != e.size {
			return fmt.Errorf("%s: %w: parts of %q do not make its size", s.key(m.ID), ErrDamaged, e.path)
		}
		e.ext, e.lists = flat, false
	}
	return nil
}

// gone explains an error of reading what a manifest needs: if retention removed the
// manifest meanwhile, its packs may rightly be missing.
func (s *Session) gone(ctx context.Context, id string, err error) error {
	if err == nil || !errors.Is(err, ErrDamaged) {
		return err
	}
	if _, statErr := s.r.store.Stat(ctx, s.key(id)); errors.Is(statErr, objstore.ErrNotFound) {
		return fmt.Errorf("%w: %s was removed meanwhile", ErrNotFound, id)
	}
	return err
}
