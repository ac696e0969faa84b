package checkpoint

import (
	"errors"
	"math"
	"testing"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
)

// Generations that leave no room for a next one.
func TestAbsurdGeneration(t *testing.T) {
	r := newRig(t, objstore.NewMemory(), nil)
	for _, g := range []uint64{math.MaxUint64, maxGeneration + 1} {
		o := Owner{SessionUID: "u", Generation: g}
		if _, _, err := r.s.Acquire(t.Context(), o); err == nil {
			t.Errorf("generation %d was taken", g)
		}
		_, err := r.store.Put(t.Context(), r.repo.Session("t").headKey(), encodeHead(Head{Owner: o}), objstore.PutOptions{})
		must(t, err)
		_, err = r.repo.Session("t").Head(t.Context())
		if !errors.Is(err, ErrDamaged) {
			t.Error(err)
		}
	}
	if h, err := r.s.Head(t.Context()); err != nil || h.Owner != owner1 {
		t.Errorf("%+v %v", h, err)
	}
}
