package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"sync"
)

// Check reads all that a checkpoint needs (id "" is the newest) and names what is
// damaged, with the files that miss it.
func (s *Session) Check(ctx context.Context, id string) error {
	m, all, err := s.open(ctx, id)
	if err != nil {
		return err
	}
	blocks, targets, _ := byBlock(all)
	var mu sync.Mutex
	var bad []error
	named := 0
	report := func(err error) error {
		if !errors.Is(err, ErrDamaged) {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		if named++; named <= maxNotes {
			bad = append(bad, err)
		}
		return nil
	}
	// One job at a time may fail without ending the others.
	for _, j := range jobs(blocks) {
		err := s.r.fetchJob(ctx, j, func(b *block, plain []byte) error {
			for _, t := range targets[b] {
				if _, err := s.r.content(t.c, plain); err != nil {
					return fmt.Errorf("%w (needed for %q)", err, t.e.path)
				}
			}
			return nil
		})
		if err != nil {
			if err := report(err); err != nil {
				return err
			}
		}
	}
	if named > len(bad) {
		bad = append(bad, fmt.Errorf("and %d more", named-len(bad)))
	}
	return s.gone(ctx, m.ID, errors.Join(bad...))
}
