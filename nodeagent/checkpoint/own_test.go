package checkpoint

import (
	"testing"

	nodev1 "github.com/cloudcode-dev/cloudcode/proto/cloudcode/node/v1"
)

// What the server says of an endpoint that a user named reaches all that connects to it.
func TestOwnEndpointsAreRestricted(t *testing.T) {
	for _, on := range []bool{true, false} {
		c := StorageConfig(&nodev1.AssignedStorage{Endpoint: "https://s3.example.com", Own: on, PublicOnly: on}).ObjStore()
		if c.Quiet != on || c.PublicOnly != on {
			t.Errorf("%v: %v, %v", on, c.Quiet, c.PublicOnly)
		}
	}
}
