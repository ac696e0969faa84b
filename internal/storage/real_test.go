package storage_test

import (
	"errors"
	"testing"

	"github.com/cloudcode-dev/cloudcode/internal/objstore"
	"github.com/cloudcode-dev/cloudcode/internal/s3test"
	"github.com/cloudcode-dev/cloudcode/internal/storage"
)

func TestRealServer(t *testing.T) {
	srv := s3test.Start(t, s3test.Options{Region: "eu-test-1", AccessLog: true})
	c := srv.Bucket("bucket")
	c.Region, c.Root = "auto", "team/a"
	for _, deep := range []bool{false, true} {
		if err := storage.Check(t.Context(), c, deep); err != nil {
			t.Errorf("deep %v: %v", deep, err)
		}
	}
	if n := srv.Requests()["PutObject"]; n != 4 {
		t.Errorf("%d puts: %v", n, srv.Requests())
	}
	if r, err := storage.ResolveRegion(t.Context(), c); err != nil || r != "eu-test-1" {
		t.Errorf("region %q, %v", r, err)
	}
	all := c
	all.Root = ""
	s, err := storage.Open(all)
	if err != nil {
		t.Fatal(err)
	}
	defer objstore.Close(s)
	for o, err := range s.List(t.Context(), "", "", "") {
		t.Errorf("left in the bucket: %v, %v", o, err)
	}
	below, err := storage.Open(c)
	if err != nil {
		t.Fatal(err)
	}
	defer objstore.Close(below)
	if _, err := below.Put(t.Context(), "main/workspace/x", nil, objstore.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	if o, err := s.Stat(t.Context(), "team/a/main/workspace/x"); err != nil {
		t.Errorf("%+v, %v", o, err)
	}
	if by, err := storage.WrittenByOriginal(t.Context(), below, "main"); !by || err != nil {
		t.Errorf("by the original: %v, %v", by, err)
	}
	c.Bucket = "another"
	if err := storage.Check(t.Context(), c, true); !errors.Is(err, objstore.ErrNoBucket) {
		t.Errorf("another bucket: %v", err)
	}
	c.Bucket = ""
	if err := storage.Check(t.Context(), c, true); !errors.Is(err, storage.ErrInvalid) {
		t.Errorf("no bucket: %v", err)
	}
}
