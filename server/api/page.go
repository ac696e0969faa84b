package api

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"slices"
)

const (
	defaultPage = 100
	maxPage     = 1000
	// maxPageBytes ends a page early: clients refuse messages of more than 4 MB.
	maxPageBytes = 2 << 20
)

// pageToken says where the next page begins, and for which list.
type pageToken struct {
	After string `json:"a"`
	List  []byte `json:"l"`
}

func listDigest(kind, filter string) []byte {
	sum := sha256.Sum256([]byte(kind + "\x00" + filter))
	return sum[:8]
}

// page reads the size and token of a list request.
func page(v *violations, kind, filter string, size int32, token string) (limit int, after string) {
	switch {
	case size < 0:
		v.add("page_size", "must not be negative")
	case size == 0:
		limit = defaultPage
	default:
		limit = min(int(size), maxPage)
	}
	if token == "" {
		return limit, ""
	}
	var t pageToken
	data, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil || json.Unmarshal(data, &t) != nil || t.After == "" {
		v.add("page_token", "is not one that this server has made")
	} else if !slices.Equal(t.List, listDigest(kind, filter)) {
		v.add("page_token", "is from a list with another filter: begin again without a token")
	}
	return limit, t.After
}

func nextPage(kind, filter, after string) string {
	data, _ := json.Marshal(pageToken{After: after, List: listDigest(kind, filter)}) // cannot fail
	return base64.RawURLEncoding.EncodeToString(data)
}
