package objstore_test

import (
	"fmt"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
	"github.com/cloudcode-dev/cloudcode/internal/objstore/objstoretest"
	"github.com/cloudcode-dev/cloudcode/internal/s3test"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestMemory(t *testing.T) {
	objstoretest.Run(t, func(*testing.T) objstore.Store { return objstore.NewMemory() })
}

func TestS3(t *testing.T) {
	srv := s3test.Start(t, s3test.Options{})
	var buckets atomic.Int64
	objstoretest.Run(t, func(t *testing.T) objstore.Store {
		c := srv.Bucket(fmt.Sprintf("conformance-%d", buckets.Add(1)))
		return openStore(t, c.ObjStore())
	})
}

func openStore(t testing.TB, c objstore.Config) objstore.Store {
	t.Helper()
	s, err := objstore.Open(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := objstore.Close(s); err != nil {
			t.Error(err)
		}
	})
	return s
}
