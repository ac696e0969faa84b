//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/cloudcode-dev/cloudcode/internal/s3test"
	"github.com/cloudcode-dev/cloudcode/internal/storage"
)

// store is a bucket of a real S3 server, which fleets reach by way of a proxy
// that can break, and tests without it.
type store struct {
	server *s3test.Server
	proxy  *s3test.Proxy
	life   *longTB
	config storage.Config // by way of the proxy
	client *minio.Client
	http   *http.Transport
}

// longTB is a test that lives as long as it is wanted, for what several tests share.
type longTB struct {
	testing.TB
	dir      string
	cleanups []func()
}

func (l *longTB) Helper()          {}
func (l *longTB) Cleanup(f func()) { l.cleanups = append(l.cleanups, f) }
func (l *longTB) Fatal(args ...any) {
	panic(fmt.Sprint(args...))
}

func (l *longTB) Fatalf(format string, args ...any) {
	panic(fmt.Sprintf(format, args...))
}

func (l *longTB) TempDir() string {
	dir, err := os.MkdirTemp(l.dir, "s3")
	if err != nil {
		panic(err)
	}
	return dir
}

func (l *longTB) end() {
	for _, f := range slices.Backward(l.cleanups) {
		f()
	}
	l.cleanups = nil
}

// startStore starts the S3 server with one bucket. stop ends it.
func startStore(tb testing.TB) *store {
	tb.Helper()
	s3test.Find(tb) // skips, or fails if it must
	dir := filepath.Join(work.dir, "s3")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		tb.Fatal(err)
	}
	life := &longTB{TB: tb, dir: dir}
	server := s3test.Start(life, s3test.Options{AccessLog: true})
	st := &store{server: server, life: life, proxy: server.Proxy(0)}
	work.stores = append(work.stores, st)
	return st.newBucket(tb, "cloudcode")
}

// newBucket makes one more bucket of the same server.
func (s *store) newBucket(tb testing.TB, name string) *store {
	tb.Helper()
	direct := s.server.Bucket(name)
	n := &store{server: s.server, proxy: s.proxy, life: s.life, config: s.proxy.Config(direct), http: &http.Transport{}}
	var err error
	n.client, err = minio.New(s.server.Addr(), &minio.Options{
		Creds: credentials.NewStaticV4(direct.AccessKeyID, direct.SecretAccessKey, ""), Region: direct.Region, BucketLookup: minio.BucketLookupPath, Transport: n.http,
	})
	if err != nil {
		tb.Fatal(err)
	}
	s.life.Cleanup(n.http.CloseIdleConnections)
	return n
}

func (s *store) stop() { s.life.end() }

// env is the server's configuration.
func (s *store) env() []string {
	return []string{
		storage.EnvEndpoint + "=" + s.config.Endpoint, storage.EnvBucket + "=" + s.config.Bucket, storage.EnvPathStyle + "=true",
		storage.EnvAccessKeyID + "=" + s.config.AccessKeyID, storage.EnvSecretAccessKey + "=" + s.config.SecretAccessKey,
	}
}

// sizes of all objects below prefix, by key.
func (s *store) sizes(tb testing.TB, prefix string) map[string]int64 {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out := map[string]int64{}
	for o := range s.client.ListObjects(ctx, s.config.Bucket, minio.ListObjectsOptions{Prefix: prefix, Recursive: true}) {
		if o.Err != nil {
			tb.Fatalf("list %s: %v", prefix, o.Err)
		}
		out[o.Key] = o.Size
	}
	return out
}

// get returns nil for an object that is not there.
func (s *store) get(tb testing.TB, key string) []byte {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	o, err := s.client.GetObject(ctx, s.config.Bucket, key, minio.GetObjectOptions{})
	if err != nil {
		tb.Fatalf("get %s: %v", key, err)
	}
	defer o.Close()
	data, err := io.ReadAll(o)
	var r minio.ErrorResponse
	if errors.As(err, &r) && r.Code == minio.NoSuchKey {
		return nil
	}
	if err != nil {
		tb.Fatalf("get %s: %v", key, err)
	}
	return data
}

func (s *store) put(tb testing.TB, key string, data []byte) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := s.client.PutObject(ctx, s.config.Bucket, key, bytes.NewReader(data), int64(len(data)), minio.PutObjectOptions{}); err != nil {
		tb.Fatalf("put %s: %v", key, err)
	}
}
