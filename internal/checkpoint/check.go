package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
)

// checkWorkers read whole packs: few, because each holds one in memory.
const checkWorkers = 3

// Check reads all that a checkpoint needs (id "" is the newest): manifest, tree, and
// every pack from its first byte to its last. It names each object that is damaged
// and files that miss it.
func (s *Session) Check(ctx context.Context, id string) error {
	m, all, err := s.open(ctx, id)
	if err != nil {
		return err
	}
	_, targets, _ := byBlock(all)
	needed := map[*pack][]*block{}
	for b := range targets {
		needed[b.pack] = append(needed[b.pack], b)
	}
	var mu sync.Mutex
	var bad []error
	g, each := errgroup.WithContext(ctx)
	g.SetLimit(checkWorkers)
	for _, p := range m.packs {
		g.Go(func() error {
			err := s.r.checkPack(each, p, needed[p], targets)
			if err == nil || !errors.Is(err, ErrDamaged) {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			bad = append(bad, err)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	slices.SortFunc(bad, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return s.gone(ctx, m.ID, errors.Join(bad...))
}

func (r *Repository) checkPack(ctx context.Context, p *pack, needed []*block, targets map[*block][]target) error {
	key := r.pack(p.id)
	text, _, err := r.store.Get(ctx, key)
	if errors.Is(err, objstore.ErrNotFound) {
		return fmt.Errorf("%s: %w: it is missing%s", key, ErrDamaged, victims(needed, targets))
	}
	if err != nil {
		return fmt.Errorf("read %s: %w", key, err)
	}
	index, err := r.crypt.readPackIndex(p.id, text)
	if err != nil {
		return fmt.Errorf("%s: %w%s", key, err, victims(needed, targets))
	}
	// By the pack's own index, so that chunks are checked that only others need.
	at := map[int64]*block{}
	for _, b := range needed {
		at[b.off] = b
	}
	off := int64(packHeader)
	for _, k := range index {
		b := &block{pack: p, off: off, stored: k.stored, plain: k.plain}
		plain, err := r.openBlock(b, text[off:][:k.stored])
		for pos, i := uint32(0), 0; err == nil && i < len(k.chunks); i++ {
			_, err = r.content(&chunk{id: k.chunks[i].id, blk: b, off: pos, n: k.chunks[i].n}, plain)
			pos += k.chunks[i].n
		}
		if err == nil && at[off] != nil {
			for _, t := range targets[at[off]] {
				if _, err = r.content(t.c, plain); err != nil {
					break
				}
			}
		}
		if err != nil {
			var of []*block
			if at[off] != nil {
				of = append(of, at[off])
			}
			return fmt.Errorf("%w%s", err, victims(of, targets))
		}
		delete(at, off)
		off += int64(k.stored)
	}
	if len(at) > 0 {
		return fmt.Errorf("%s: %w: %d blocks are not in its index", key, ErrDamaged, len(at))
	}
	return nil
}

// victims names some files that need the blocks.
func victims(blocks []*block, targets map[*block][]target) string {
	const some = 3
	seen := map[string]bool{}
	var names []string
	for _, b := range blocks {
		for _, t := range targets[b] {
			if !seen[t.e.path] {
				seen[t.e.path] = true
				names = append(names, fmt.Sprintf("%q", t.e.path))
			}
		}
	}
	if len(names) == 0 {
		return ""
	}
	slices.Sort(names)
	more := ""
	if len(names) > some {
		more = fmt.Sprintf(" and %d more", len(names)-some)
		names = names[:some]
	}
	return ", needed for " + strings.Join(names, ", ") + more
}
